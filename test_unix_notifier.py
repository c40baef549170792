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
Tests of the units, in their order in the module.

They build the hard states on purpose and step the loop by hand, without its
thread, wherever that is possible: see SteppedHub. Every wait is bounded and
ends as soon as what it waits for is there; nothing sleeps for a fixed time.
"""

import bisect
import collections
import contextlib
import copy
import ctypes
import datetime
import decimal
import errno
import fcntl
import functools
import gc
import glob
import grp
import inspect
import io
import itertools
import json
import logging
import os
import pickle
import random
import resource
import select
import selectors
import signal
import socket
import stat
import struct
import sys
import threading
import time
import traceback
import tracemalloc
import types
import unittest
from unittest import mock
import uuid

import fixtures
import netaddr
from oslo_config import cfg
from oslo_config import fixture as config_fixture
from oslo_context import context
import oslo_messaging
from oslo_messaging.notify import _impl_log
from oslo_serialization import jsonutils
from oslotest import base
from stevedore import extension
from testtools import content
import yaml

import unix_notifier

HERE = os.path.dirname(os.path.abspath(__file__))
GROUP = 'oslo_messaging_notifications'
KEYS = ['message_id', 'publisher_id', 'event_type', 'priority', 'payload',
        'timestamp']

# Seconds that a wait may take on a busy machine; and what nothing takes that
# has not to wait.
WAIT = 20
PROMPT = 5

# A user that is neither root nor the owner of anything here.
NOBODY = 65534

as_root = unittest.skipUnless(os.geteuid() == 0, 'needs root')


# -- helpers ----------------------------------------------------------------

def message(payload):
    """A notification as the Notifier builds it."""
    return dict(dict.fromkeys(KEYS, 'x'), payload=payload)


def numbered(number, size=0):
    return message({'n': number, 'pad': 'x' * size})


def line(number, size=0):
    return unix_notifier._encode(numbered(number, size))


def parse(data):
    """One line of strict JSON; NaN and infinities are not."""
    def refuse(constant):
        raise AssertionError('%s is no JSON' % constant)

    assert data.isascii() and data.find(b'\n') == len(data) - 1, data[:80]
    return json.loads(data, parse_constant=refuse)


def account(messages, number=0):
    """The number of the notification after the last of the messages.

    Fails unless each is in its place, or a record stands there for it.
    """
    for each in messages:
        payload = each['payload']
        if each['event_type'] == 'notifications.lost':
            assert payload['lost'] > 0, each
            number += payload['lost']
        else:
            assert payload['n'] == number, (payload['n'], number)
            number += 1
    return number


def lost(messages):
    """What records stand for, in their order."""
    return [each['payload']['lost'] for each in messages
            if each['event_type'] == 'notifications.lost']


def wait_until(predicate):
    deadline = time.monotonic() + WAIT
    while not predicate():
        assert time.monotonic() < deadline, 'waited in vain'
        time.sleep(0.001)


def open_files():
    # Else what earlier tests have left might go between two looks.
    gc.collect()
    return set(os.listdir('/proc/self/fd'))


def touch(path):
    with open(path, 'w'):
        pass


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def listen(path, backlog=8):
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen(backlog)
    return sock


@contextlib.contextmanager
def lingering():
    """What passes, by a socket, what takes long to close: till this ends."""
    def give(sock):
        # Its own is not the last, unless the kernel refuses to pass it.
        with contextlib.suppress(PermissionError):
            socket.send_fds(sock, [b'x'], [ours.fileno()])
            ours.close()

    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(('127.0.0.1', 0)))
        ours = stack.enter_context(
            socket.create_connection(server.getsockname()))
        stack.enter_context(server.accept()[0])     # nobody reads
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                        struct.pack('ii', 1, 2 * PROMPT))
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                ours.send(bytes(1 << 20))
        yield give


def none_left(*args):
    raise RuntimeError("can't start new thread")


def in_child(function, fork=os.fork):
    """Call it in a forked child; the traceback if it raised, or ''."""
    reader, writer = os.pipe()
    pid = fork()
    if not pid:
        text = ''
        try:
            os.close(reader)
            signal.alarm(WAIT)
            function()
        except BaseException:
            text = traceback.format_exc()
        finally:
            try:
                os.write(writer, text.encode()[:4096])
            except OSError:     # else it would go on with the tests
                os._exit(1)
            os._exit(0)
    os.close(writer)
    with open(reader) as file:
        text = file.read()
    return text + str(os.waitpid(pid, 0)[1] or '')


@contextlib.contextmanager
def held_elsewhere(context):
    """Another thread is in the context meanwhile."""
    held, done = threading.Event(), threading.Event()

    def hold():
        with context:
            held.set()
            done.wait(WAIT)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(WAIT)
    try:
        yield
    finally:
        done.set()
        thread.join(WAIT)


@contextlib.contextmanager
def as_uid(uid):
    before = os.geteuid()
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(before)


@contextlib.contextmanager
def no_descriptors(spare=0):
    """Let the process open no file, or so many, until it has closed one."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + spare, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


class Client:
    """A process on the socket, which takes nothing but strict JSON."""

    def __init__(self, path):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(WAIT)
        self.sock.connect(path)
        self.messages = []
        self.ended = False
        self._rest = bytearray()

    def receive(self, size=1024 * 1024):
        try:
            data = self.sock.recv(size)
        except ConnectionResetError:
            data = b''
        self.ended = not data
        self._rest += data
        if b'\n' in data:
            *lines, self._rest = self._rest.split(b'\n')
            self.messages += [parse(each + b'\n') for each in lines]

    def read(self):
        """All messages that have come."""
        while not self.ended and select.select([self.sock], [], [], 0)[0]:
            self.receive()
        return self.messages

    def wait(self, count):
        """So many messages, as the loop's thread sends them."""
        while len(self.messages) < count and not self.ended:
            self.receive()
        return self.messages

    def refusal(self):
        """The reason for which it was refused."""
        only, = self.read()
        assert self.ended, 'not the end of the stream'
        assert only['event_type'] == 'notifications.refused', only
        return only['payload']['reason']


class FakeSocket:
    """A socket whose kernel buffer has as much room as the test says."""

    def __init__(self):
        self.room = 0
        self.data = bytearray()
        self.offers = []    # (buffers, bytes)

    def sendmsg(self, buffers, ancdata, flags):
        assert flags & socket.MSG_NOSIGNAL
        data = b''.join(buffers)
        self.offers.append((len(buffers), len(data)))
        if not self.room:
            raise BlockingIOError
        sent = min(len(data), self.room)
        self.data += data[:sent]
        self.room -= sent
        return sent

    def send(self, data, flags):
        return self.sendmsg([data], (), flags)


class FakeListener:
    """A listener whose accept() does what the script says, then works.

    The script has errnos, and callables to call once accept() has returned.
    """

    def __init__(self, sock, script):
        self._sock = sock
        self.script = list(script)
        self.accepts = 0

    def __getattr__(self, name):
        return getattr(self._sock, name)

    def accept(self):
        self.accepts += 1
        step = self.script.pop(0) if self.script else None
        if isinstance(step, int):
            raise OSError(step, os.strerror(step))
        result = self._sock.accept()
        if step:
            step()
        return result


def inside(name):
    """What a hub has under the name, to be read and set, or called."""
    *owners, last = name.split('.')
    return property(
        lambda hub: getattr(functools.reduce(getattr, owners, hub), last),
        lambda hub, value: setattr(
            functools.reduce(getattr, owners, hub), last, value))


class SteppedHub(unix_notifier._Hub):
    """A hub, in the words of the tests: they name nothing else inside one.

    Its loop is the test, and nothing ever starts the thread, unless it is not
    to be stepped. Hooks, such as on_accept(), take what to call at a moment.
    Most return what ends that; on_look(), on_asleep() and on_handed_over()
    call it once.
    """

    starts = 0
    asleep = inside('loop.inbox.asleep')
    backlog = inside('loop.fanout.backlog')
    checked_at = inside('loop.inbox.checked')
    count_drop = inside('loop.inbox.drops.__next__')
    count_left = inside('loop.inbox.left')
    credit = inside('loop.hand_over.busy_until')
    drop = inside('loop.inbox.drop')
    emit = inside('loop.inbox.emit')
    gap = inside('loop.inbox.gap')
    gate = inside('loop.inbox.look')
    lock = inside('loop.path.lock')
    reserve = inside('loop.role._door._reserve')
    rest = inside('loop.inbox.rest')     # of a line, to be sent
    retry_at = inside('loop.retry.at')
    room = inside('loop.inbox.room')
    selector = inside('loop.files._selector')
    settings = inside('loop.settings')
    starting = inside('_starting')
    tell_lags_at = inside('loop.lags.at')
    tell_visits_at = inside('loop.visits.at')
    wake = inside('loop.inbox.wake')
    waker = inside('loop.inbox.waker')
    anyone_seen = property(lambda self: bool(
        (self.loop.role.clear()[0] if self.served or self.loop.role.streams
         else self.gate)()))
    bytes_queued = property(
        lambda self: sum(map(len, filter(None, self.loop.inbox.lines))))
    descriptors = property(
        lambda self: [each.fileno() for each in self.loop.files._owned])
    gate_open = property(lambda self: self.gate is unix_notifier._yes)
    holds_lock = property(lambda self: self.lock.intact())
    identity = property(lambda self: self.loop.path.bound[''].identity)
    owns_path = property(lambda self: self.loop.path.bound[''].intact())
    queued = property(lambda self: len(self.loop.inbox.lines))   # entries
    served = property(lambda self: '' in self.loop.path.bound)
    subscribers = property(lambda self: list(self.loop.role.streams))
    timeout = property(lambda self: self.loop._timeout(None))
    called_last = property(lambda self: self.loop.role._door.locked)
    ready = property(lambda self: self.loop.turn.aim is not None)
    taken = property(lambda self: self.loop.turn.taken)
    waiting = property(lambda self: self.loop.inbox.waiting())

    roles = unix_notifier._Seeker, unix_notifier._Alone

    def __init__(self, settings, stepped=True):
        with mock.patch.multiple(unix_notifier._Loop, seek=self.roles[0],
                                 others=self.roles[1]):
            super().__init__(settings)
        self.loop.seek, self.loop.others = self.roles
        self.hand_over(not stepped)
        if not stepped:     # as it is, without a frame more
            self.start = self.loop.inbox._start = super().start

    def hand_over(self, does):
        """Whether emit() itself may send; else all is queued, to be seen."""
        self.loop.inbox.hand_over = (
            self.loop.hand_over.send if does else lambda line: False)

    def start(self):
        self.starts += 1
        self.asleep = False     # as the loop has it while it is awake

    def turn(self, limit=0):
        return self.loop.step(limit)

    def take(self, due):
        self.loop.fanout.take(due, ())

    @property
    def listener(self):
        return self.loop.path.bound[''].sock

    @listener.setter
    def listener(self, sock):
        self.loop.path.bound[''].sock = self.loop.role._door._sock = sock

    def overdue(self):
        """Make the next turn look after the path, whatever the time."""
        self.checked_at -= 60
        if self.retry_at:
            self.retry_at = 0

    def look_again(self, times=1):
        for _ in range(times):
            self.overdue()
            self.loop.step(0)

    def finish(self, seconds=WAIT):
        if not self.loop.closing:
            self.loop.closing = True
            self.loop.turn.take_from_us()
            self._leave(time.monotonic() + seconds)

    def late_event(self, subscriber):
        """One that was there before it parted."""
        self.loop.role.see_off(subscriber)
        subscriber.ended = 'a test'
        self.loop.fanout.on_event(subscriber, selectors.EVENT_READ)

    def _hook(self, name, before=bool, after=bool):
        *owners, last = name.split('.')
        owner = functools.reduce(getattr, owners, self)
        method = getattr(owner, last)

        def hooked(*arguments):
            before()
            result = method(*arguments)
            after()
            return result

        setattr(owner, last, hooked)
        return functools.partial(setattr, owner, last, method)

    on_accept = functools.partialmethod(_hook, 'loop.role.let_in')
    on_close_listener = functools.partialmethod(_hook, 'loop.path.free')
    on_crowd = functools.partialmethod(_hook, 'loop.visits.crowd')
    on_flush = functools.partialmethod(_hook, 'loop.fanout.flush')
    on_work = functools.partialmethod(_hook, 'loop.inbox.count')
    on_turn = functools.partialmethod(_hook, 'loop.step')

    def on_intact(self, function):
        """When it has looked at the path."""
        return self._hook('loop._look', after=function)

    def on_look(self, function):
        """After one, whatever it has found."""
        look, todo = self.gate, [function]

        def hooked():
            found = look()
            if todo:
                todo.pop()()
            return found

        self.gate = hooked

    def on_asleep(self, function):
        """Before the flag is up."""
        end = self._hook('loop.inbox.waiting',
                         after=lambda: end() or function())

    def on_select(self, function):
        """With the timeout; what it returns, if anything, was found."""
        selector = self.loop.files._selector
        select = selector.select
        selector.select = lambda timeout: (
            select(timeout) if (found := function(timeout)) is None else found)
        return functools.partial(setattr, selector, 'select', select)

    def on_hand_over(self, function):
        """When emit() is about to send: only if that returns True."""
        turn = self.loop.turn
        turn.aim = turn.aim._replace(look=function, expected=True)

    def on_handed_over(self, function):
        """When emit() has given the turn back."""
        class Free(collections.deque):
            def append(free, token):
                self.loop.turn.free = collections.deque([token])
                function()

        self.loop.turn.free = Free([True])


class TestCase(base.BaseTestCase):

    DEFAULT_TIMEOUT = 120

    def setUp(self):
        super().setUp()
        self.log = self.useFixture(fixtures.FakeLogger(
            level=logging.DEBUG,
            format='%(levelname)s %(threadName)s %(message)s'))
        self.dir = self.useFixture(fixtures.TempDir()).path
        self.path = os.path.join(self.dir, 's')

    def patch(self, name, value):
        """Set what the module finds under the name."""
        self.useFixture(fixtures.MonkeyPatch(
            unix_notifier.__name__ + '.' + name, value))

    def without_gil(self):
        """What is made from now on takes it that there is none."""
        self.useFixture(fixtures.MockPatchObject(
            sys, '_is_gil_enabled', lambda: False, create=True))

    @property
    def who(self):
        """As the log names this process."""
        return 'pid %d, uid %d' % (os.getpid(), os.geteuid())

    def assertKeepsGil(self, function):
        """Other threads do not run meanwhile, which may take them 5 ms."""
        if not getattr(sys, '_is_gil_enabled', lambda: True)():
            self.skipTest('there is no GIL to keep')
        turns, stopping = itertools.count(), threading.Event()
        self.addCleanup(stopping.set)

        def run():
            while not stopping.is_set():
                next(turns)

        threading.Thread(target=run, daemon=True).start()
        interval = sys.getswitchinterval()
        self.addCleanup(sys.setswitchinterval, interval)
        wait_until(lambda: next(turns) > 1)
        sys.setswitchinterval(1)    # only who gives it up loses the GIL
        gc.collect()        # or what others have left is closed meanwhile
        before = next(turns)
        for _ in range(5):
            function()
        after = next(turns)
        sys.setswitchinterval(interval)
        self.assertEqual(before + 1, after)

    def counted(self, owner, name):
        """A mock in its place, which passes calls on."""
        return self.useFixture(fixtures.MockPatchObject(
            owner, name, wraps=getattr(owner, name))).mock

    def switch_threads_often(self):
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-6)

    def run_threads(self, targets):
        threads = [threading.Thread(target=each) for each in targets]
        for each in threads:
            each.start()
        for each in threads:
            each.join(WAIT)
            self.assertFalse(each.is_alive())

    def make_conf(self, sock_path='', **options):
        """The options as a service reads them, from a file."""
        if sock_path is not None:
            options['sock_path'] = sock_path or self.path
        name = os.path.join(self.useFixture(fixtures.TempDir()).path, 'conf')
        with open(name, 'w') as file:
            file.write('[%s]\n' % GROUP)
            file.writelines('%s = %s\n' % each for each in options.items())
        conf = cfg.ConfigOpts()
        conf([], project='test', default_config_files=[name])
        return conf

    def make_settings(self, **options):
        conf = self.make_conf(**options)
        unix_notifier.register_opts(conf)
        return unix_notifier._read_settings(conf)

    def patch_drivers(self):
        """Have drivers make hubs that speak as the tests do."""
        class Hub(SteppedHub):
            roles = unix_notifier._Loop.seek, unix_notifier._Loop.others

            def __init__(self, settings):
                super().__init__(settings, stepped=False)

        self.patch('_Hub', Hub)

    def connect(self, hub=None):
        client = Client(self.path)
        self.addCleanup(client.sock.close)
        if hub is not None:
            hub.turn()
        return client

    def await_service(self):
        wait_until(lambda: 'served with' in self.log.output)

    def emit(self, hub, numbers, size=0):
        for number in numbers:
            hub.emit(numbered(number, size))

    def assertLogged(self, text, times=1):
        self.assertEqual(times, self.log.output.count(text), self.log.output)

    def assertRefused(self, path):
        with socket.socket(socket.AF_UNIX) as sock:
            self.assertRaises(ConnectionRefusedError, sock.connect, path)

    def remove_all(self):
        for name in os.listdir(self.dir):
            os.unlink(os.path.join(self.dir, name))

    @contextlib.contextmanager
    def assertPrompt(self):
        before = time.monotonic()
        yield
        self.assertLess(time.monotonic() - before, PROMPT)

    def assertNames(self, error, *texts):
        for text in texts:
            self.assertIn(text, str(error))


# -- format -----------------------------------------------------------------

class ReprRaises:

    def __repr__(self):
        raise RuntimeError


class Shown:
    """Its repr is the text."""

    def __init__(self, text):
        self.text = text

    def __repr__(self):
        return self.text


class Net(netaddr.IPNetwork):
    """As neutron derives some."""

    __module__ = None       # only the base tells


class MAC(netaddr.EUI):
    """As neutron derives some."""


class ItemsRaise(dict):

    def items(self):
        raise RuntimeError


class Tape:
    """An iterator that counts how often it was asked."""

    asked = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.asked += 1
        assert self.asked < 1000, 'it has no end'
        return self.asked


class Endless:
    """An iterable that is no iterator, and has no end."""

    def __init__(self):
        self.tape = Tape()

    def __iter__(self):
        return self.tape


class EncodeTest(TestCase):

    def payload(self, value, mask=False):
        return parse(unix_notifier._encode(message(value), mask))['payload']

    def test_line_has_the_message_and_then_context_and_topics(self):
        """And nothing that other drivers, which share it, have added."""
        payload = {'text': 'two\nlines\r\u2028\u00e9 \U0001f600 "\\'}
        shared = dict(message(payload), topics='x', _unique_id='x',
                      _context_auth_token='secret')
        for mask, ctxt, topics in itertools.product(
                (False, True), (None, {}, {'user': 'u'}),
                (None, [], ['a', 'notifications'])):
            more = {'context': ctxt, 'topics': topics}
            expected = dict(message(payload), **{
                key: more[key] for key in more if more[key] is not None})
            found = parse(unix_notifier._encode(shared, mask, ctxt, topics))
            self.assertEqual(list(expected.items()), list(found.items()))
        self.assertIn('_unique_id', shared)

    def test_real_notifications_print_as_the_log_driver_does(self):
        with open(os.path.join(HERE, 'functional', 'notifications.ndjson'),
                  'rb') as file:
            messages = [json.loads(each) for each in file]
        printed = self.useFixture(fixtures.FakeLogger(format='%(message)s'))
        driver = _impl_log.LogDriver(None, [], None)
        for each in messages:
            driver.notify({}, each, each['priority'], 0)
            self.assertEqual(jsonutils.dumps(each).encode() + b'\n',
                             unix_notifier._encode(each))
        self.assertEqual(printed.output.encode(), b''.join(
            unix_notifier._encode(each, mask=True) for each in messages))
        self.assertEqual(100, len(messages))

    def test_secrets_are_masked_on_demand(self):
        secret = {'auth': {'password': 'hunter2', 'user': 'me'}}
        self.assertEqual(secret, self.payload(secret))
        for extra in ({}, {'not': float('nan')}, {(1, 2): {3}}):
            payload = self.payload(dict(secret, x=extra), mask=True)
            self.assertEqual({'password': '***', 'user': 'me'},
                             payload['auth'])
        self.assertEqual([{'password': '***'}, "{'password': '***'}"],
                         self.payload([{b'password': 'hunter2'},
                                       Shown("{'password': 'hunter2'}")],
                                      mask=True))

    def test_what_json_cannot_take_becomes_something_it_can(self):
        nan, inf = float('nan'), float('inf')
        cycle, ring, user = {}, [], collections.UserDict()
        cycle['a'], user['a'] = cycle, user
        ring.append(ring)
        bad = ReprRaises()
        bad_text = '<ReprRaises instance at %#x>' % id(bad)
        thing, lock, now = object(), threading.Lock(), datetime.datetime.now()
        number = uuid.uuid4()
        for value, expected in (
                (nan, None), ([inf, -inf, 1.5], [None, None, 1.5]),
                ({'a': {'b': (nan, 'c')}}, {'a': {'b': [None, 'c']}}),
                ({1}, [1]), (frozenset('a'), ['a']), ({nan}, [None]),
                (collections.deque([{2}, nan]), [[2], None]),
                ({'a': 1}.values(), [1]), (range(2), [0, 1]),
                (collections.UserDict(a={3}), {'a': [3]}),
                (collections.UserDict({(1, 2): nan}), {'(1, 2)': None}),
                (types.MappingProxyType({'a': nan}), {'a': None}),
                (now, jsonutils.to_primitive(now)),
                (now.date(), jsonutils.to_primitive(now.date())),
                (netaddr.IPNetwork('10.0.0.0/8'), '10.0.0.0/8'),
                ([Net('fe80::/64'), nan], ['fe80::/64', None]),
                ({Net('10.0.0.0/8'): MAC('fa:16:3e:00:00:01')},
                 {'10.0.0.0/8': 'FA-16-3E-00-00-01'}),
                (range(10 ** 12), 'range(0, 1000000000000)'),
                (number, str(number)), ({number: 1}, {str(number): 1}),
                (decimal.Decimal('NaN'), 'NaN'),
                (ValueError('bad'), "ValueError('bad')"),
                (OSError(2, 'no'), "FileNotFoundError(2, 'no')"),
                (netaddr.AddrFormatError(), 'AddrFormatError()'),
                (b'text \xc3\xa9', 'text \u00e9'), (b'\xff', "b'\\xff'"),
                ({b'a': 1, b'\xff': 2}, {'a': 1, "b'\\xff'": 2}),
                (thing, repr(thing)), (lock, repr(lock)), (1j, '1j'),
                ({thing: lock}, {repr(thing): repr(lock)}),
                (cycle, {'a': '...'}), (ring, ['...']), (user, {'a': '...'}),
                ({(1, 2): 'a', frozenset([3]): nan},
                 {'(1, 2)': 'a', 'frozenset({3})': None}),
                ({nan: 1}, {'null': 1}), ({None: 1, True: nan, 1.5: 3},
                                          {'null': 1, 'true': None, '1.5': 3}),
                (10 ** 400, 10 ** 400), ([10 ** 5000, 1], ['<no repr>', 1]),
                ({'a': bad, 'b': 1}, {'a': bad_text, 'b': 1}),
                ([bad, nan], [bad_text, None]), ({bad: nan}, {bad_text: None}),
                ([ItemsRaise(a=1), 2], ["{'a': 1}", 2])):
            for mask in (False, True):      # there is no secret in it
                self.assertEqual(expected, self.payload(value, mask))

    def test_lone_surrogates_are_replaced_and_nothing_else_is(self):
        for text, expected in (
                ('\ud83d', '\ufffd'), ('\udfff\ud800', '\ufffd\ufffd'),
                ('\ud83d\U0001f600\ude00', '\ufffd\U0001f600\ufffd'),
                ('\\\ude00', '\\\ufffd'), ('"\ud83dude00', '"\ufffdude00'),
                ('\\ud83d\ude00', '\\ud83d\ufffd'),
                ('\ud83d\\ude00', '\ufffd\\ude00'),
                *[(each, each) for each in (
                    '\\ud83d', '\\\\ude00', '\\\U0001f600', '\U0010ffff',
                    '\ud7ff\ue000', '\\ud83d\U0001f600')]):
            for mask in (False, True):
                self.assertEqual({expected: [expected]},
                                 self.payload({text: [text]}, mask))
            self.assertEqual({expected: None},
                             self.payload({text: float('nan')}))

    def test_what_has_no_end_is_cut(self):
        class Inventory:
            def items(self):
                return zip(itertools.count(), itertools.count())

        self.patch('_ITEMS_MAX', 4096)
        # Not one path through it is long, but there are 10 ** 32.
        ring = [{} for _ in range(30)]
        for each in ring:
            each.update(enumerate(ring))
        for value in (ring, ring[0], ValueError(ring), Inventory(),
                      collections.UserList(ring)):
            for mask in (False, True):
                self.assertIn('...', str(self.payload(value, mask))
                              .replace('Inventory object at', '...'))
        self.assertIn('Inventory object at', self.payload(Inventory()))
        shared = functools.reduce(lambda x, _: [x, x], range(30), float('nan'))
        self.assertIn('...', str(self.payload(shared)))
        self.assertEqual([None] + [0] * 5000,
                         self.payload([float('nan')] + [0] * 5000))

    def test_depth_has_an_end(self):
        for depth in (900, 10000):
            for wrap in (lambda x: [x], lambda x: {'a': x}, lambda x: (x, {1}),
                         lambda x: collections.UserList([x])):
                deep = functools.reduce(
                    lambda x, _: wrap(x), range(depth), float('nan'))
                self.payload(deep)
                self.payload(deep, mask=True)

    def test_iterators_are_left_to_the_caller(self):
        for wrap in (lambda x: x, lambda x: [x], lambda x: {x},
                     lambda x: collections.deque([x]), lambda x: (x, {1: {x}}),
                     lambda x: collections.UserList([x, float('nan')]),
                     lambda x: {'a': x}.values(),
                     lambda x: collections.UserDict({x: x})):
            for mask in (False, True):
                tape, endless = Tape(), Endless()
                text = json.dumps(self.payload(wrap(tape), mask))
                self.assertIn('Tape object', text)
                self.payload(wrap(endless), mask)
                self.assertEqual(0, tape.asked + endless.tape.asked)
        for each in (itertools.count(), itertools.cycle('ab'), iter(int, 1),
                     (x for x in itertools.repeat(0)), map(str, [1])):
            self.assertEqual(repr(each), self.payload(each))
            self.assertEqual([repr(each)], self.payload({each}))

    def test_record_reads_like_a_notification(self):
        first, second = (parse(unix_notifier._lost_record(7, 'why'))
                         for _ in range(2))
        self.assertEqual(KEYS, list(first))
        self.assertEqual(
            ('notifications.lost', 'WARN', {'lost': 7, 'reason': 'why'}),
            (first['event_type'], first['priority'], first['payload']))
        self.assertNames(first['publisher_id'], socket.gethostname(),
                         str(os.getpid()))
        self.assertNotEqual(uuid.UUID(first['message_id']),
                            uuid.UUID(second['message_id']))
        datetime.datetime.fromisoformat(first['timestamp'])

    def test_what_is_deep_is_not_even_tried(self):
        """On Pythons whose encoder would go on, and take long to come back."""
        self.patch('_PROBES', True)
        deep = functools.reduce(lambda inner, _: {'a': inner}, range(5000), 1)
        lines = self.counted(unix_notifier, '_line')
        for payload, times in (deep, 1), ({'a': [1]}, 2), (uuid.uuid4(), 3):
            self.payload(payload)
            self.assertEqual(times, lines.call_count)
        self.assertNotIn(deep, [each.args[0]['payload']
                                for each in lines.call_args_list])

    def test_one_payload_in_many_threads_is_no_cycle(self):
        self.switch_threads_often()
        payload = {'deep': [[{'a': [uuid.UUID(int=1)]}]] * 50}
        expected, found = unix_notifier._encode(message(payload)), set()

        def encode():
            for _ in range(50):
                found.add(unix_notifier._encode(message(payload)))

        self.run_threads([encode] * 4)
        self.assertEqual({expected}, found)
        self.assertEqual({}, unix_notifier._markers)

    def test_one_that_fails_amid_another_does_it_no_harm_without_a_gil(self):
        class Other:
            def __repr__(self):
                unix_notifier._encode(message(float('nan')))
                return 'other'

        self.without_gil()
        self.patch('_dumps', unix_notifier._make_encoder())
        lines = self.counted(unix_notifier, '_line')
        self.assertEqual('other', self.payload(Other()))
        self.assertEqual(1 + 2, lines.call_count)


def full_context(**kwargs):
    """One with everything set, each to a text that names it."""
    names = inspect.signature(context.RequestContext).parameters
    values = {name: 'the ' + name for name in names if name != 'overwrite'}
    values.update({name: ['the ' + name] for name in ('roles',
                                                      'service_roles')})
    return context.RequestContext(**dict(values, overwrite=False, **kwargs))


class ContextTest(TestCase):

    # Of the full context; by messagingv2 a reader gets all but user_id,
    # domain_id and so on, and the names.
    EXPECTED = dict({key: 'the ' + key for key in (
        'request_id', 'global_request_id', 'user_id', 'project_id',
        'domain_id', 'user_domain_id', 'project_domain_id', 'user_name',
        'project_name', 'domain_name', 'user_domain_name',
        'project_domain_name', 'is_admin')}, roles=['the roles'],
        user='the user_id', project='the project_id', domain='the domain_id',
        user_domain='the user_domain_id',
        project_domain='the project_domain_id')

    def test_full_context_tells_whose_request_it_is_and_no_secret(self):
        full = full_context()
        full.auth_token_info = full.service_catalog = {'token': 'the token'}
        for each in full, full.redacted_copy():
            found = unix_notifier._context(each)
            self.assertEqual(self.EXPECTED, found)
        self.assertNotIn('token', str(found))

    def test_dict_is_sent_by_its_own_names(self):
        of_neutron = {
            'request_id': 'r', 'user_id': 'u', 'tenant_id': 't',
            'project_id': 't', 'tenant_name': 'T', 'user_name': 'U',
            'roles': ['member'], 'is_admin': False, 'user': 'u',
            'tenant': 't', 'global_request_id': None}
        self.assertEqual(of_neutron, unix_notifier._context(dict(
            of_neutron, auth_token='a', timestamp='now', read_only=False,
            service_catalog=[{'type': 'volume'}], session_token='s')))
        as_dict = full_context().to_dict()
        self.assertIn('auth_token', as_dict)
        self.assertEqual(
            {key: value for key, value in self.EXPECTED.items()
             if key in as_dict}, unix_notifier._context(as_dict))
        # Nor is what could hold a secret, by whatever name.
        token = {'id': 'secret'}
        self.assertEqual({'project_id': 'p'}, unix_notifier._context({
            'user': token, 'roles': [token], 'user_id': {token['id']},
            'project': b'secret', 'domain': Shown('secret'),
            'project_id': 'p', 'user_name': ['a', ['secret']]}))

    def test_what_is_no_context_is_an_empty_one(self):
        class Bad(context.RequestContext):
            def to_dict(self):
                raise ZeroDivisionError

        for each in (None, {}, 'text', object(), Bad(), ItemsRaise(), 1):
            self.assertEqual({}, unix_notifier._context(each))


# -- options ----------------------------------------------------------------

class OptionsTest(TestCase):

    def test_all_are_read_and_the_path_alone_is_needed(self):
        for options, expected in (
                ({}, (0o660, None, 64, 8 << 20, False, False)),
                (dict(sock_mode='0600', sock_group='users',
                      sock_max_subscribers=2, sock_buffer_size=65536,
                      sock_mask_secrets=True, sock_send_context=True),
                 (0o600, 'users', 2, 65536, True, True))):
            self.assertEqual((self.path, *expected),
                             tuple(self.make_settings(**options)))

    def test_list_is_a_documented_copy(self):
        (group, opts), = unix_notifier.list_opts()
        self.assertEqual((GROUP, [
            'sock_path', 'sock_mode', 'sock_group', 'sock_max_subscribers',
            'sock_buffer_size', 'sock_mask_secrets', 'sock_send_context']),
            (group, [each.name for each in opts]))
        for each in opts:
            self.assertRegex(each.help, r'^[A-Z].*\.$')
            self.assertFalse(each.required)
        opts.pop().help = 'changed'
        opts = unix_notifier.list_opts()[0][1]
        self.assertEqual(7, len(opts))
        self.assertNotEqual('changed', opts[-1].help)

    def test_registered_already_is_used_as_it_is(self):
        conf = self.make_conf()
        conf.register_opts([cfg.StrOpt('sock_path', help='Another help.'),
                            cfg.BoolOpt('sock_mask_secrets', default=True)],
                           group=GROUP)
        for _ in range(2):
            unix_notifier.register_opts(conf)
        settings = unix_notifier._read_settings(conf)
        self.assertEqual((self.path, True),
                         (settings.path, settings.mask_secrets))

    def test_paths_and_uris_name_a_path(self):
        longest = '/' + 'x' * 100
        for text, path in (
                ('/a/b c', '/a/b c'), ('unix:///a/b', '/a/b'),
                ('unix:/a/b', '/a/b'), ('unix:///a%20b%3F', '/a b?'),
                (longest, longest), ('unix://' + longest, longest),
                ('/' + '\u00e9' * 50, '/' + '\u00e9' * 50)):
            self.assertEqual(path, unix_notifier._parse_path(text))

    TOO_LONG = '/' + 'x' * 101
    # An option, a value, and what the error has to name.
    BAD = (
        ('sock_path', None, ('not set',)),
        ('sock_path', '""', ('not set',)),
        ('sock_path', 'run/s', ("'run/s'", 'absolute')),
        ('sock_path', 'unix:run/s', ("'unix:run/s'", 'absolute')),
        ('sock_path', '/run/', ("'/run/'", 'file')),
        ('sock_path', '/', ("'/'", 'file')),
        ('sock_path', 'unix:///a%00', ('absolute',)),
        ('sock_path', TOO_LONG, (TOO_LONG, '102', '101')),
        ('sock_path', '/' + '\u00e9' * 51, ('103', '101')),
        ('sock_path', 'unix://host/s', ('unix://host/s', 'host')),
        ('sock_path', 'unix:///s?a=b', ('query',)),
        ('sock_path', 'unix:///s#a', ('fragment',)),
        ('sock_path', '/run/<service>/s', ('<service>', '$option')),
        ('sock_path', '/run/%(user)s', ('%(user)s', '$option')),
        ('sock_path', '/run/{user}', ('{user}', '$option')),
        ('sock_path', '/run/$nobody/s', ('nobody',)),
        ('sock_path', '/run/$no.group/s', ('no such group',)),
        ('sock_group', '$nobody', ('nobody',)),
        ('sock_mode', '0999', ('0999', 'octal', '0777')),
        ('sock_mode', 'rw', ("'rw'", 'octal', '0777')),
        ('sock_mode', '-1', ('-1', '0000')),
        ('sock_mode', '01777', ('01777', '0777')),
        ('sock_mode', '6_6_0', ('6_6_0', 'octal')),
        ('sock_max_subscribers', '0', ('0', '1')),
        ('sock_max_subscribers', 'many', ('many',)),
        ('sock_buffer_size', '65535', ('65535', '65536')),
        ('sock_mask_secrets', 'perhaps', ('perhaps',)),
        ('sock_send_context', 'perhaps', ('perhaps',)))

    def test_bad_values_are_named_with_their_limits(self):
        for option, value, texts in self.BAD:
            error = self.assertRaises(
                ValueError, unix_notifier.UnixDriver,
                self.make_conf(**{option: value}))
            self.assertNames(error, option, *texts)
        self.assertEqual([], os.listdir(self.dir))


# -- the lock and the socket file -------------------------------------------

class LockTest(TestCase):

    def held(self):
        lock = unix_notifier._Lock(self.path)
        self.addCleanup(lock.close)
        lock.acquire()
        return lock

    def assertNotAcquired(self, error_type, *texts):
        """Refused for a reason that is named; no descriptor is left open."""
        lock, before = unix_notifier._Lock(self.path), open_files()
        error = self.assertRaises(error_type, lock.acquire)
        self.assertNames(error, *texts)
        self.assertEqual(before, open_files())
        self.assertEqual((None, False), (lock.fd, lock.intact()))
        return error.errno

    def test_free_lock_is_the_owners_alone(self):
        lock = self.held()
        self.assertTrue(lock.intact())
        self.assertEqual(0o600, mode_of(self.path))
        self.assertFalse(os.get_inheritable(lock.fd))
        lock.close()    # the file stays
        self.assertTrue(os.path.exists(self.path))
        self.assertTrue(self.held().intact())

    def test_held_lock_names_its_holder(self):
        lock = self.held()
        self.assertNotAcquired(BlockingIOError, 'unknown', self.path)
        lock.write([])
        self.assertEqual(errno.EAGAIN, self.assertNotAcquired(
            BlockingIOError, 'process %d' % os.getpid(), self.path))
        # Neither other descriptors nor children free it.
        touch(self.path)
        self.assertEqual('', in_child(lock.close))
        self.assertNotAcquired(BlockingIOError)

    def test_who_may_but_read_it_can_hold_it(self):
        fd = os.open(self.path, os.O_RDONLY | os.O_CREAT, 0o600)
        self.addCleanup(os.close, fd)
        for pid, text in ((b'7', 'last owner was process 7'),
                          (b'null', 'unknown'), (b'"\\u001b[1m"', 'unknown'),
                          (b'9' * 4000, 'unknown'), (b'[7]', 'unknown')):
            lock = self.held()
            os.pwrite(lock.fd, b'{"pid": %s}' % pid, 0)
            lock.close()
            fcntl.flock(fd, fcntl.LOCK_SH)
            self.assertNotAcquired(BlockingIOError, text, self.path)
            fcntl.flock(fd, fcntl.LOCK_UN)

    def test_record_comes_back_and_garbage_reads_as_nothing(self):
        lock = self.held()
        lock.write([types.SimpleNamespace(path=self.path, identity=[1, 2])])
        lock.write([])      # forgets nothing
        self.assertEqual({'pid': os.getpid(), '/s': [1, 2]}, lock.read())
        for garbage in (b'', b'\xff\xfe', b'{"pid": 1', b'[1]', b'7', b'null',
                        b'"text"', b'[[[], 1]]', b'x' * 9000, b'[' * 4096,
                        b'{"a":' * 800, b'1' * 4096):
            os.ftruncate(lock.fd, 0)
            os.pwrite(lock.fd, garbage, 0)
            self.assertEqual({}, lock.read(), garbage)
        lock.write([])
        self.assertEqual({'pid': os.getpid()}, lock.read())

    def test_what_is_no_file_with_one_link_is_refused(self):
        target = os.path.join(self.dir, 'target')
        os.symlink(target, self.path)
        self.assertEqual(errno.ELOOP,
                         self.assertNotAcquired(OSError, self.path))
        self.assertFalse(os.path.exists(target))
        touch(target)
        for make, error_type, text in (
                (lambda: os.link(target, self.path), OSError, 'one link'),
                (lambda: os.mkfifo(self.path), OSError, 'regular'),
                (lambda: os.mkdir(self.path), IsADirectoryError, '')):
            os.unlink(self.path)
            make()
            self.assertNotAcquired(error_type, text, self.path)

    @as_root
    def test_root_and_a_service_keep_out_of_each_others_way(self):
        os.chmod(os.path.dirname(self.dir), 0o755)
        os.chown(self.dir, NOBODY, -1)
        self.assertNotAcquired(PermissionError, 'uid %d' % NOBODY, self.dir)
        self.assertEqual([], os.listdir(self.dir))
        # The other way round is fine.
        os.chown(self.dir, 0, -1)
        os.chmod(self.dir, 0o777)
        with as_uid(NOBODY):
            self.held().close()
        # But what is another's is no lock.
        os.chown(self.path, 1, -1)
        os.chmod(self.path, 0o666)
        for uid in 0, NOBODY:
            with as_uid(uid):
                self.assertNotAcquired(PermissionError, 'uid 1', self.path)

    def test_replaced_before_flock_is_let_go(self):
        def replace_first(fd, operation, flock=fcntl.flock):
            os.unlink(self.path)
            touch(self.path)
            flock(fd, operation)

        self.patch('fcntl.flock', replace_first)
        self.assertNotAcquired(BlockingIOError, 'replaced', self.path)

    def test_replaced_while_held_is_noticed(self):
        lock = self.held()
        os.rename(self.path, self.path + '.old')
        self.assertFalse(lock.intact())
        os.symlink(self.path + '.old', self.path)   # others would refuse it
        self.assertFalse(lock.intact())
        os.unlink(self.path)
        self.assertTrue(self.held().intact())
        self.assertFalse(lock.intact())


class BoundTest(TestCase):

    # Whom we may give a file to.
    GID = os.getgid() if os.geteuid() else 12345

    def bind(self, mode=0o660, gid=None):
        lock = mock.create_autospec(unix_notifier._Lock)
        bound = unix_notifier._bind(unix_notifier._unix_socket(), self.path,
                                    mode, lock, gid)
        self.addCleanup(bound.sock.close)
        lock.write.assert_called_once_with([bound])
        return bound

    def test_nobody_slips_in_before_mode_and_group_are_set(self):
        """Without the umask, which is the whole process's."""
        groups, chmod = [], os.chmod

        def spy(path, mode):
            self.assertRefused(path)
            groups.append(os.stat(path).st_gid)
            chmod(path, mode)

        self.patch('os.chmod', spy)
        self.addCleanup(os.umask, os.umask(0o077))
        with fixtures.MonkeyPatch('os.umask', None):
            bound = self.bind(0o606, self.GID)
        self.assertEqual(0o077, os.umask(0o077))
        self.assertRefused(self.path)
        info = os.stat(self.path)
        self.assertEqual(
            (0o606, self.GID, [self.GID], unix_notifier._identity(info)),
            (mode_of(self.path), info.st_gid, groups, bound.identity))
        bound.sock.listen()
        self.connect()

    def test_what_takes_the_name_is_left_as_it_is(self):
        """Right after bind(), or late: once the file that is ours is open."""
        other = os.path.join(self.dir, 'other')

        def new(path):
            listen(path).close()

        def old(path):
            new(path)
            os.utime(path, (0, 0))

        def foreign(path):
            new(path)
            os.chown(path, 1, -1)

        cases = [(touch, other), (new, other), (touch, self.path),
                 (old, self.path)]
        if os.geteuid() == 0:
            cases.append((foreign, self.path))
        for (make, path), late in itertools.product(cases, (False, True)):
            before = self._bind_amid_swap(make, path, late)
            self.assertEqual(before, os.stat(self.path), (make, path, late))
            self.remove_all()

    def _bind_amid_swap(self, make, path, late):
        """Make what takes the name, itself or by a link to the path."""
        ours, before = self.path + '.bound', []

        def swap(function, *args):
            result = function(*args)
            os.rename(self.path, ours)
            make(path)
            os.chmod(path, 0o600)
            if path != self.path:
                os.symlink(path, self.path)
            before.append(os.stat(self.path))
            return result

        if late:
            with fixtures.MonkeyPatch('os.open',
                                      functools.partial(swap, os.open)):
                identity = self.bind(0o604, self.GID).identity
            info = os.stat(ours)
            self.assertEqual((0o604, self.GID, identity), (
                mode_of(ours), info.st_gid, unix_notifier._identity(info)))
        else:
            with unix_notifier._unix_socket() as sock:
                green = mock.Mock(wraps=sock, bind=functools.partial(
                    swap, sock.bind))
                # Without a lock, for that is not to be written.
                error = self.assertRaises(OSError, unix_notifier._bind, green,
                                          self.path, 0o604, None, self.GID)
            self.assertNames(error, self.path)
            self.assertNotEqual(0o604, mode_of(ours))
        return before.pop()

    def test_failure_leaves_nothing_and_names_the_path(self):
        os.chmod(self.dir, 0o777)
        os.chmod(os.path.dirname(self.dir), 0o755)
        missing = os.path.join(self.dir, 'missing', 's')
        no_file = mock.Mock(side_effect=OSError(errno.EMFILE, 'a test'))
        for path, gid, opener, error_type in (
                (self.path, 1, os.open, PermissionError),
                (self.path, None, no_file, OSError),
                (missing, None, os.open, FileNotFoundError)):
            self.path = path
            with as_uid(os.geteuid() or NOBODY):
                before = open_files()
                with fixtures.MonkeyPatch('os.open', opener):
                    error = self.assertRaises(
                        error_type, self.bind, 0o660, gid)
                self.assertNames(error, path)
                self.assertEqual((before, []),
                                 (open_files(), os.listdir(self.dir)))

    def test_unlink_removes_only_our_own(self):
        bound = self.bind()
        self.assertTrue(bound.intact())
        for _ in range(2):
            bound.unlink()
            self.assertFalse(bound.intact() or os.path.exists(self.path))
        successor = self.bind()
        self.assertFalse(bound.intact())
        bound.unlink()
        self.assertTrue(successor.intact())
        with fixtures.MonkeyPatch('os.unlink', os.rmdir):   # not permitted
            successor.unlink()
        # A link to it is not it.
        os.rename(self.path, self.path + '.bound')
        os.symlink(self.path + '.bound', self.path)
        self.assertFalse(successor.intact())
        successor.unlink()
        self.assertTrue(os.path.islink(self.path))

    def test_group_is_a_name_or_a_number(self):
        mine = grp.getgrgid(os.getgid())
        self.assertIsNone(unix_notifier._gid(None))
        self.assertEqual(4711, unix_notifier._gid('4711'))
        self.assertEqual(mine.gr_gid, unix_notifier._gid(mine.gr_name))
        for bad in ('no-such-group', '-1', '4294967295', '4294967296',
                    '\u00b2', ' '):
            error = self.assertRaises(OSError, unix_notifier._gid, bad)
            self.assertNames(error, 'sock_group', bad)


class ClearTest(TestCase):

    def identity(self):
        return unix_notifier._identity(os.lstat(self.path))

    def assertKept(self, number, left=None):
        before = os.lstat(self.path)
        error = self.assertRaises(
            OSError, unix_notifier._clear, self.path, left)
        self.assertEqual((number, self.path), (error.errno, error.filename))
        self.assertEqual(before.st_ino, os.lstat(self.path).st_ino)

    def test_stale_socket_goes(self):
        unix_notifier._clear(self.path, None)   # nothing is fine, too
        for left in (lambda: None, lambda: [1, 2, 3], self.identity):
            listen(self.path).close()
            unix_notifier._clear(self.path, left())
            self.assertEqual([], os.listdir(self.dir))
        # So does a dead leader's that a child answers, as a forked one does.
        for change in (lambda: None, lambda: os.chmod(self.path, 0o604),
                       lambda: os.link(self.path, self.path + '.link')):
            with listen(self.path):
                left = self.identity()
                change()    # and an administrator by hand
                unix_notifier._clear(self.path, left)
            self.assertFalse(os.path.exists(self.path))

    def test_what_is_no_socket_stays(self):
        touch(self.path)
        self.assertKept(errno.EEXIST)
        # Not even if it has the number of the socket that was here.
        self.assertKept(errno.EEXIST, self.identity())
        os.unlink(self.path)
        listen(self.path + '2').close()
        os.symlink(self.path + '2', self.path)
        self.assertKept(errno.EEXIST)

    def test_fork_waits_while_a_socket_is_asked(self):
        # Or the child would have a connection that it does not know of.
        free, make = [], unix_notifier._unix_socket

        def fork():
            free.append(unix_notifier._no_fork().acquire(blocking=False))
            if free[-1]:
                unix_notifier._no_fork().release()

        def spy():
            self.run_threads([fork])
            return make()

        self.patch('_unix_socket', spy)
        unix_notifier._answers(self.path)
        self.assertEqual([False], free)

    def test_foreign_live_socket_stays(self):
        with listen(self.path, 0):
            self.assertKept(errno.EADDRINUSE)
            # Even if it got the inode of one of ours, or is kept busy.
            device, inode, mtime = self.identity()
            self.assertKept(errno.EADDRINUSE, [device, inode, mtime - 1])
            for _ in range(3):
                client = socket.socket(socket.AF_UNIX)
                self.addCleanup(client.close)
                client.setblocking(False)
                client.connect_ex(self.path)
            self.assertKept(errno.EADDRINUSE)
        os.unlink(self.path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(self.path)
            self.assertKept(errno.EADDRINUSE)


# -- the backlog ------------------------------------------------------------

class BacklogTest(TestCase):

    def test_lines_are_joined_up_to_a_limit(self):
        self.patch('_CHUNK_MAX', 100)
        backlog = unix_notifier._Backlog(0)
        chunk, data, counts = backlog.tail, b'', []
        backlog.extend([])
        self.assertIs(chunk, backlog.tail)
        lines = [b'x' * size + b'\n' for size in
                 (9, 9, 79, 1, 99, 100, 500, 0, 0, 98, 1, 97)]
        backlog.extend(lines)
        while chunk.next:
            data += chunk.data
            counts.append(chunk.next.first - chunk.first)
            chunk = chunk.next
        self.assertEqual((b''.join(lines), [3, 1, 1, 1, 1, 2, 1, 2]),
                         (data, counts))


class SubscriberTest(TestCase):

    def make(self, limit=1 << 30):
        backlog = unix_notifier._Backlog(limit)
        subscriber = unix_notifier._Subscriber(FakeSocket(), backlog, 'who')
        return subscriber, subscriber.sock, backlog

    def drain(self, subscriber):
        """Send all that is pending; all messages that were sent."""
        while subscriber.pending():
            subscriber.sock.room = 1 << 30
            subscriber.flush()
        return [parse(each)
                for each in bytes(subscriber.sock.data).splitlines(True)]

    def test_any_traffic_is_accounted_for(self):
        self.patch('_CHUNK_MAX', 600)
        for seed in range(120):
            self._random_traffic(random.Random(seed))

    def _random_traffic(self, rng):
        subscriber, sock, backlog = self.make(rng.choice((0, 1000, 6000)))
        total = 0
        for _ in range(80):
            action = rng.randrange(10)
            if action < 3:
                count = rng.randrange(4)
                backlog.extend([line(total + n, rng.choice((0, 99, 900)))
                                for n in range(count)])
                total += count
            elif action < 4:
                backlog.append(unix_notifier._lost_record(3, 'full'), 0, 3)
                total += 3
            elif action < 6:
                subscriber.trim(backlog)
                self.assertFalse(subscriber.trim(backlog))
            elif subscriber.pending():
                sock.room = rng.choice((0, 1, 30, 170, 400, 3000))
                before = len(sock.data)
                subscriber.flush()
                self.assertEqual(subscriber.blocked, len(sock.data) - before
                                 < sock.offers[-1][1])
            whole = bytes(sock.data).split(b'\n')[:-1]
            sent = sum(b'notifications.lost' not in each for each in whole)
            self.assertEqual(sent, subscriber.received())
        messages = self.drain(subscriber)
        self.assertEqual(total, account(messages))
        self.assertEqual((sum(lost(messages)), len(messages)), (
            subscriber.lost, subscriber.received() + len(lost(messages))))

    def test_line_larger_than_the_buffer_reaches_who_is_ready(self):
        subscriber, sock, backlog = self.make(1000)
        backlog.extend([line(0, 5000)])
        self.assertFalse(subscriber.trim(backlog))
        sock.room = 100
        subscriber.flush()
        backlog.extend([line(1, 5000)])
        # Half sent as it is, it goes whole; the newest one is kept.
        self.assertFalse(subscriber.trim(backlog))
        messages = self.drain(subscriber)
        self.assertEqual((2, []), (account(messages), lost(messages)))

    def test_within_the_buffer_nothing_is_skipped(self):
        chunk = len(line(0)) + unix_notifier._CHUNK_COST
        subscriber, sock, backlog = self.make(3 * chunk)
        for number, trims in enumerate((False, False, False, True)):
            backlog.extend([line(number)])
            self.assertEqual(trims, subscriber.trim(backlog))
        messages = self.drain(subscriber)
        self.assertEqual((4, [1]), (account(messages), lost(messages)))
        self.assertEqual('subscriber too slow',
                         messages[0]['payload']['reason'])

    def test_one_send_is_bounded(self):
        self.patch('_CHUNK_MAX', 4096)
        subscriber, sock, backlog = self.make()
        backlog.extend([line(0, 1000)] * 3000)
        for _ in range(2000):
            backlog.append(b'2\n', 1)
        self.drain(subscriber)
        buffers, sizes = zip(*sock.offers)
        self.assertTrue(100 < max(buffers) < 1024)      # IOV_MAX
        self.assertTrue(0.5 < max(sizes) / unix_notifier._SEND_MAX < 1.1)

    def test_what_was_sent_is_freed(self):
        subscriber, sock, backlog = self.make()
        first = subscriber.chunk
        backlog.extend([line(0)])
        references = sys.getrefcount(first)
        self.drain(subscriber)
        self.assertEqual(references - 1, sys.getrefcount(first))
        self.assertIs(backlog.tail, subscriber.chunk)

    def peers(self, backlog=None):
        ours, peer = socket.socketpair()
        ours.setblocking(False)
        self.addCleanup(ours.close)
        self.addCleanup(peer.close)
        return unix_notifier._Subscriber(
            ours, backlog or unix_notifier._Backlog(0), 'who'), peer

    def test_short_send_keeps_the_gil_on_demand(self):
        """And does as any other where the kernel takes no more of it."""
        backlog = unix_notifier._Backlog(1 << 30)
        subscriber, peer = self.peers(backlog)
        sends = self.counted(unix_notifier._libc, 'send')
        for size, keep, times in ((10, False, 0), (10, True, 1),
                                  (unix_notifier._SHORT, True, 1)):
            backlog.extend([line(0, size)])
            subscriber.flush(keep)
            self.assertEqual(line(0, size), peer.recv(1 << 20))
            self.assertEqual((times, False),
                             (sends.call_count, subscriber.pending()))
        emitted, data = [], b''
        while not subscriber.blocked:
            emitted.append(line(len(emitted), 9000))
            backlog.extend(emitted[-1:])
            subscriber.flush(True)
        peer.settimeout(WAIT)
        while data.count(b'\n') < len(emitted):
            data += peer.recv(1 << 20)
            if subscriber.pending():
                subscriber.flush()
        self.assertEqual(emitted, data.splitlines(True))
        backlog.extend([line(0)])
        peer.close()
        self.assertRaises(BrokenPipeError, subscriber.flush, True)

    def test_what_the_peer_sends_is_discarded_up_to_a_limit(self):
        subscriber, peer = self.peers()
        for _ in range(63):
            peer.send(b'x' * 1024)
            self.assertIsNone(subscriber.listen())
        for _ in range(1024):   # which recv() drops
            peer.send(b'x', socket.MSG_OOB)
            self.assertIsNone(subscriber.listen())
        peer.send(b'x', socket.MSG_OOB)
        self.assertIn('65536', subscriber.listen())

    def test_descriptors_that_come_after_the_look_are_not_taken(self):
        self.patch('_guarded', lambda: False)
        subscriber, peer = self.peers()
        ours = subscriber.sock
        reading, writing = os.pipe()
        self.addCleanup(os.close, reading)

        def look(*args):
            found = ours.recvmsg(*args)
            socket.send_fds(peer, [b'x'], [writing])
            os.close(writing)
            return found

        peer.send(b'x')
        subscriber.sock = mock.Mock(wraps=ours, recvmsg=look)
        self.assertIsNone(subscriber.listen())
        subscriber.sock = ours
        self.assertEqual('it sent descriptors', subscriber.listen())
        self.assertEqual([], select.select([reading], [], [], 0)[0])

    def test_no_descriptor_is_no_reason_to_stay_unguarded(self):
        unix_notifier._can_guard.cache_clear()
        with fixtures.MonkeyPatch('socket.socket', mock.Mock(
                side_effect=OSError(errno.EMFILE, 'a test'))):
            self.assertFalse(unix_notifier._guarded())
        self.assertEqual(0, unix_notifier._can_guard.cache_info().currsize)
        unix_notifier._unix_socket().close()
        self.assertEqual(1, unix_notifier._can_guard.cache_info().currsize)

    def test_numbers_of_users_have_no_sign(self):
        uid = 3 * 10 ** 9
        self.assertEqual(('pid 7, uid 3000000000', uid), unix_notifier._peer(
            mock.Mock(getsockopt=lambda *_: struct.pack('iII', 7, uid, uid))))

    def test_gone_peer_is_noticed(self):
        for unread in (b'', b'x'):
            subscriber, peer = self.peers()
            subscriber.sock.send(unread)
            peer.close()
            self.assertEqual('it is gone', subscriber.listen())
        self.assertEqual((self.who, os.geteuid()),
                         unix_notifier._peer(subscriber.sock))


# -- any thread ---------------------------------------------------------------

class EventTest(TestCase):

    def test_descriptor_is_private_and_goes_with_it(self):
        before = open_files()
        event = unix_notifier._Event()
        self.assertFalse(os.get_inheritable(event.fileno()))
        del event
        self.assertEqual(before, open_files())
        # Nor is one kept when there is no other.
        for name in 'socket.socket', 'os.eventfd':
            with fixtures.MonkeyPatch(name, none_left):
                self.assertRaises(RuntimeError, unix_notifier._Event)
            self.assertEqual(before, open_files())

    def test_gate_looks_at_each(self):
        events = [unix_notifier._Event() for _ in range(3)]
        look = unix_notifier._poll(*(each.fileno() for each in events))
        for each in events:
            self.assertFalse(look())
            for _ in range(2):      # are cleared at once
                each.set()
                self.assertTrue(look())
            each.clear()
        each.close()        # is a reason to go on
        self.assertTrue(look())


class HubCase(TestCase):

    def make_hub(self, served=True, **options):
        hub = SteppedHub(self.make_settings(**options))
        self.addCleanup(hub.finish)
        hub.turn()
        self.assertEqual(served, hub.served)
        return hub

    def make_served(self, count=1, **options):
        """A hub, and so many clients."""
        hub = self.make_hub(**options)
        return hub, *(self.connect(hub) for _ in range(count))

    def make_threaded(self, **options):
        hub = SteppedHub(self.make_settings(**options), stepped=False)
        self.addCleanup(hub.close)
        return hub

    def start_hub(self, **options):
        """A hub with its thread, and a client."""
        hub = self.make_threaded(**options)
        hub.start()
        self.await_service()
        client = self.connect()
        wait_until(lambda: hub.subscribers)
        return hub, client

    def take_over(self):
        """Another hub has the path, whoever had it."""
        self.remove_all()
        return self.make_hub()

    def spy(self, hub, first=lambda: None):
        """For a hook: what is emitted then, after the first, is queued."""
        def spying():
            before = hub.queued
            first()
            self.emit(hub, range(1))
            spied.append(hub.queued - before)

        spied = []
        self.addCleanup(lambda: self.assertEqual({1}, set(spied)))
        return spying

    def script(self, hub, *steps):
        hub.listener = FakeListener(hub.listener, steps)
        self.patch('_accept', lambda listener: listener.accept()[0])
        return hub.listener

    def pump(self, hub, client, total, first=0):
        """Turn until the client has what was emitted, all in its place."""
        def done():
            hub.turn()
            return account(client.read(), first) == total

        wait_until(done)

    def said(self, hub, text, seconds, step):
        """When it was logged, as time goes by and the path is looked after."""
        now = [time.monotonic() // 1 + 1]   # of which sums are exact
        times, count = [], self.log.output.count(text)
        with fixtures.MonkeyPatch('time.monotonic', lambda: now[0]):
            for passed in range(step, seconds + step, step):
                now[0] += step
                hub.turn()
                if self.log.output.count(text) > count:
                    times.append(passed)
                    count += 1
        return times

    def assertServed(self, hub, *clients):
        """The next notification reaches them."""
        text = str(uuid.uuid4())
        hub.emit(message(text))
        hub.turn()
        for each in clients:
            self.assertEqual(text, each.read()[-1]['payload'])

    def assertQueued(self, hub, count):
        self.assertEqual(count, hub.queued)


class StartTest(HubCase):

    """Hub: who gets what from when on."""

    def test_while_nobody_listens_nothing_is_even_serialized(self):
        """Nor does it matter that forty threads look at once."""
        hub, done = self.make_hub(), []
        self.patch('_encode', none_left)
        self.patch('_context', none_left)
        hub.emit(numbered(0), full_context())
        self.emit(hub, range(3))
        self.assertEqual(0, hub.starts)
        self.switch_threads_often()
        self.run_threads(
            40 * [lambda: done.append(self.emit(hub, range(100)))])
        self.assertEqual(40, len(done))     # none has raised anything
        self.assertQueued(hub, 0)

    def test_connect_before_notify_is_the_start(self):
        hub = self.make_hub()
        self.emit(hub, [7])
        clients = [self.connect(), self.connect()]
        self.emit(hub, range(3))
        hub.turn()
        for each in clients:
            self.assertEqual(3, account(each.read()))
            self.assertTrue(hub.gate_open)
            each.sock.close()
            hub.turn()
        self.assertFalse(hub.gate_open)

    def test_gate_changed_after_the_look_is_looked_at(self):
        def accept():
            clients.append(self.connect(hub))

        def rebind():
            os.unlink(self.path)
            hub.look_again()
            clients.append(self.connect())

        for change in accept, rebind:
            hub, clients = self.make_hub(), []
            self.assertFalse(hub.anyone_seen)
            hub.on_look(change)
            self.emit(hub, range(1))
            hub.turn()
            self.assertEqual(1, account(clients[0].read()), change)
            hub.finish()

    def test_gate_is_replaced_before_its_listener_closes(self):
        hub, looked_at = self.make_hub(), []
        gate = hub.gate
        end = hub.on_close_listener(lambda: looked_at.append(hub.gate is gate))
        os.unlink(self.path)
        hub.look_again()
        end()
        self.assertEqual([False], looked_at)
        self.assertServed(hub, self.connect(hub))

    def test_gate_is_open_before_the_first_is_accepted(self):
        # Once accepted it is no longer in the kernel's queue, nor yet in ours.
        hub = self.make_hub()
        self.script(hub, lambda: self.emit(hub, range(1)))
        client = self.connect(hub)
        hub.turn()
        self.assertEqual(1, account(client.read()))

    def test_what_comes_after_the_snapshot_waits_a_turn(self):
        hub, late = self.make_hub(), []

        def another_connects():
            if not late:
                late.append(self.connect())
                self.emit(hub, range(1))

        hub.on_accept(after=another_connects)
        first = self.connect(hub)
        hub.turn()
        for each in first, late[0]:
            self.assertEqual(1, account(each.read()))


class QueueTest(HubCase):

    """Hub: from the queue to the subscribers, and what is lost on the way."""

    def test_everybody_gets_everything_in_order(self):
        hub, *clients = self.make_served(3, sock_buffer_size=16 << 20)
        self.emit(hub, range(20))
        # More than the kernel holds.
        self.emit(hub, range(20, 22), size=3 << 20)
        clients.append(self.connect())  # gets what is on its way, too
        self.emit(hub, range(22, 25))
        hub.turn()
        one, other = hub.subscribers[:2]
        self.assertIs(one.chunk.data, other.chunk.data)     # one copy for all
        for each in clients:
            self.pump(hub, each, 25)
            self.assertEqual([], lost(each.messages))

    def test_notification_larger_than_the_buffer_arrives(self):
        hub, client = self.make_served()
        self.emit(hub, range(1), size=12 << 20)
        self.emit(hub, range(1, 2))     # no room is left
        self.pump(hub, client, 2)
        self.emit(hub, range(2, 3))
        self.pump(hub, client, 3)
        self.assertEqual([1], lost(client.messages))
        # But none of which nobody would take the line.
        self.patch('_LINE_MAX', 1000)
        self.emit(hub, range(3, 4), size=1000)
        self.pump(hub, client, 4)
        self.assertEqual([1, 1], lost(client.messages))

    def test_full_queue_leaves_records_at_their_places(self):
        hub, client = self.make_served(sock_buffer_size=65536)
        for first in (0, 100, 200):
            self.emit(hub, range(first, first + 100))
            hub.turn()
        self.emit(hub, range(300, 301))
        self.pump(hub, client, 301)
        self.assertEqual([36] * 3, lost(client.messages))
        self.assertEqual({None, 'queue full'}, {
            each['payload'].get('reason') for each in client.messages})
        self.emit(hub, range(301, 401), size=3000)      # bounded in bytes
        self.assertLess(hub.bytes_queued, 65536 + 4096)
        self.pump(hub, client, 401)

    def test_drops_at_once_count_once_and_in_place(self):
        hub, client = self.make_served(sock_buffer_size=65536)
        self.emit(hub, range(64))
        first = hub.count_drop()    # a thread has counted, and no more
        self.emit(hub, range(65, 66))
        hub.turn()
        self.emit(hub, range(66, 67))
        hub.gap = first             # goes on
        self.emit(hub, range(67, 69))
        hub.turn()
        self.emit(hub, range(69, 70))
        hub.gap = first             # whose drop has long been told
        hub.turn()
        self.assertFalse(hub.waiting)
        self.emit(hub, range(70, 71))
        self.pump(hub, client, 71)
        self.assertEqual([2, 2], lost(client.messages))

    def test_no_two_drops_get_one_number(self):
        """It can fail without a GIL alone, of which nobody promises it."""
        hub, numbers = self.make_hub(), []
        self.run_threads(8 * [lambda: numbers.extend(
            [hub.count_drop() for _ in range(10000)])])
        self.assertEqual(8 * 10000, len(set(numbers)))

    def test_nothing_is_queued_behind_an_open_gap(self):
        hub = self.make_hub(sock_buffer_size=65536)
        client, encode = self.connect(hub), unix_notifier._encode
        self.emit(hub, range(65))
        hub.take(64)        # the loop's snapshot was before the gap
        self.emit(hub, range(65, 140))
        self.pump(hub, client, 140)

        def another_thread_drops(notification, *args):
            hub.drop()
            return encode(notification, *args)

        with fixtures.MockPatchObject(unix_notifier, '_encode',
                                      another_thread_drops):
            self.emit(hub, [140])
        self.pump(hub, client, 142)
        hub.drop()
        with fixtures.MockPatchObject(unix_notifier, '_encode', none_left):
            self.emit(hub, [143])       # nor is it even serialized
        self.pump(hub, client, 144)
        self.assertEqual([76, 2, 2], lost(client.messages))

    def test_who_connects_before_a_drop_is_told_of_it(self):
        hub, late = self.make_hub(sock_buffer_size=65536), []
        client = self.connect(hub)
        self.emit(hub, range(65))

        def another_connects():
            if not late:
                late.append(self.connect())
                self.emit(hub, range(65, 66))   # finds the gap open

        hub.on_accept(after=another_connects)
        self.connect(hub)
        self.pump(hub, client, 66)
        self.assertEqual(66, account(late[0].read(), 65))

    def test_what_was_lost_while_nobody_was_there_is_not_told(self):
        hub = self.make_hub(sock_buffer_size=65536)
        hub.gate = unix_notifier._yes
        self.emit(hub, range(80))
        hub.turn()
        client = self.connect(hub)
        self.emit(hub, range(70))
        self.pump(hub, client, 70)
        self.assertEqual([6], lost(client.messages))

    def test_publisher_far_ahead_gives_way_unless_sleep_is_patched(self):
        hub, _ = self.make_served(sock_buffer_size=65536)
        slept = []
        # eventlet's is a plain function, and would switch green threads.
        for sleep, times in ((lambda delay: slept.append(delay), 0),
                             (slept.append, 27)):
            self.patch('time.sleep', sleep)
            self.emit(hub, range(60))
            self.assertEqual(times, len(slept))
            hub.turn()

    def test_beside_a_busy_thread_the_first_send_alone_gives_up_the_gil(self):
        hub, *clients = self.make_served(4)
        for limit, times in ((3600, 0), (-1, 3), (-1, 3), (3600, 0)):
            self.patch('_GIL_LATE', limit)
            sends = self.counted(unix_notifier._libc, 'send')
            self.assertServed(hub, *clients)
            self.assertEqual(times, sends.call_count)

    def test_laggard_loses_its_oldest_and_nobody_else_does(self):
        hub, slow, fast = self.make_served(2, sock_buffer_size=65536)
        laggard, _ = hub.subscribers
        for number in range(2000):
            self.emit(hub, [number], size=1000)
            hub.turn()
            fast.read()
            self.assertLess(hub.backlog.behind(laggard.chunk), 65536 + 2048)
        self.assertEqual((2000, []), (account(fast.messages),
                                      lost(fast.messages)))
        # Queue and backlog share the memory; a quarter is kept for the queue.
        self.assertEqual(8, hub.room)
        self.assertLogged(
            'WARNING MainThread Notifications on %s: subscriber lagging by '
            'more than 65536 bytes, losing notifications: %s' % (
                self.path, self.who))
        self.assertLogged('caught up', 0)
        self.emit(hub, [2000])
        for each in slow, fast:
            self.pump(hub, each, 2001)
        gaps = sum(lost(slow.messages))
        self.assertGreater(gaps, 1500)
        self.assertLogged('lagging by')
        self.assertLogged('caught up', 0)   # not within a second
        hub.tell_lags_at = 0
        hub.turn()
        self.assertLogged('caught up: %s; it lost %d notif' % (self.who, gaps))
        # The next time it counts anew.
        fast.sock.close()
        for number in range(2001, 2500):
            self.emit(hub, [number], size=1000)
            hub.turn()
        self.pump(hub, slow, 2500)
        hub.tell_lags_at = 0
        hub.turn()
        self.assertLogged('lagging by', 2)
        self.assertLogged('it lost %d notif' % (
            sum(lost(slow.messages)) - gaps))

    def test_many_threads_lose_nothing_in_silence(self):
        self.switch_threads_often()
        hub, client = self.start_hub(sock_buffer_size=65536)

        def publish(thread):
            for number in range(600):
                hub.emit(message({'n': number, 'thread': thread}))

        def read():
            while sum(each['payload'].get('lost', 1)
                      for each in client.messages) < 8 * 600:
                client.wait(len(client.messages) + 1)

        self.run_threads([functools.partial(publish, each)
                          for each in range(8)] + [read])
        expected, seen, gap = [0] * 8, [-1] * 8, -1
        for place, each in enumerate(client.messages):
            if 'lost' in each['payload']:
                gap = place
                continue
            number, thread = each['payload'].values()
            self.assertGreaterEqual(number, expected[thread])
            if number > expected[thread]:
                # What it lost was told at its place; but others may have
                # been about to queue a line when the gap was opened.
                self.assertGreater(gap, seen[thread] - 8)
            expected[thread], seen[thread] = number + 1, place


class HandOverTest(HubCase):

    """Hub: notify() itself sends, where that is plainly possible."""

    def make_ready(self, count=1):
        """A hub, whose loop would send nothing, and its subscribers."""
        hub, *clients = self.make_served(count)
        hub.hand_over(True)
        return hub, *clients

    def kernel_takes(self, size):
        """Have it take so much of what, of a size, notify() sends; or -1."""
        def send(fd, data, *_):
            taken = size(len(data))
            return os.write(fd, data[:taken]) if taken > 0 else taken

        return mock.patch.object(unix_notifier._libc, 'send', send)

    def test_line_is_sent_when_notify_returns(self):
        hub, client = self.make_ready()
        for number in range(20):
            self.emit(hub, range(number, number + 1))
            self.assertEqual(number + 1, account(client.read()))
        self.assertEqual(0, hub.starts)
        # Unless something goes before it: what is long is left to the loop,
        # and the kernel does not take it at once.
        self.emit(hub, [20], size=2 ** 20)
        hub.turn()
        self.emit(hub, [21, 22])
        self.assertQueued(hub, 2)
        self.pump(hub, client, 23)
        self.emit(hub, [23])
        self.assertEqual(24, account(client.read()))
        hub.finish()
        self.assertLogged(' 24 lines, 0 lost')

    def assertLeft(self, hub, client):
        """What is emitted is left to the loop, which sends it in its place."""
        before = len(client.read())
        self.emit(hub, [before])
        self.assertEqual((before, 1), (len(client.read()), hub.queued))
        hub.turn()
        self.assertEqual(before + 1, account(client.read()))

    def test_burst_is_left_to_the_loop_until_time_has_passed(self):
        hub, client = self.make_ready()
        with fixtures.MonkeyPatch('time.monotonic', lambda: 1000):
            hub.checked_at = 1000
            self.emit(hub, range(40))
            self.assertEqual(33, account(client.read()))
            self.assertQueued(hub, 7)
            hub.turn()
            self.assertLeft(hub, client)
        with fixtures.MonkeyPatch('time.monotonic', lambda: 1000.0006):
            self.emit(hub, range(41, 42))
            self.assertEqual(42, account(client.read()))

    def test_who_waits_goes_first_and_to_many_the_loop_sends(self):
        hub, client = self.make_ready()
        clients = [client, self.connect()]
        self.assertLeft(hub, client)
        self.assertEqual(1, account(clients[1].read()))
        clients += [self.connect(hub) for _ in range(14)]
        self.emit(hub, [1])
        self.assertEqual([1] * 16, [
            each.read()[-1]['payload']['n'] for each in clients])
        last = self.connect(hub)
        self.assertLeft(hub, client)
        self.assertEqual(3, account(last.read(), 2))

    def test_some_got_it_and_some_in_part_or_not_at_all(self):
        """Each goes on where it is, and the account is exact."""
        hub, *clients = self.make_ready(10)
        chance = random.Random(1)
        for number in range(0, 100, 2):
            hub.credit = 0
            with self.kernel_takes(lambda size: chance.choice(
                    (-1, 0, 9, size - 1, size))):
                self.emit(hub, range(number, number + 2))
            hub.turn()
            self.assertEqual([number + 2] * 10, [
                account(each.read()) for each in clients])
        self.assertEqual([100] * 10, [
            each.received() for each in hub.subscribers])

    def test_path_that_was_lost_is_the_loops_to_mend(self):
        hub, client = self.make_ready()
        os.unlink(self.path)
        for woken in 0, 1:
            self.emit(hub, [woken])
            self.assertEqual((woken + 1, woken, 0), (
                account(client.read()), hub.starts, hub.queued))
            hub.overdue()
            hub.asleep = True
        hub.turn()
        self.assertServed(hub, client, self.connect(hub))

    def test_other_threads_get_no_turn(self):
        """Not even when the path has to be looked after, beside a busy one."""
        hub, client = self.make_ready()
        hub.waker = unix_notifier._Event()

        def emit():
            hub.overdue()
            hub.asleep = True
            self.emit(hub, range(1))

        self.assertKeepsGil(emit)
        self.assertEqual((5, False), (len(client.read()), hub.asleep))

    def test_path_is_looked_at_while_the_turn_is_free(self):
        """For its system calls give up the GIL, and notify() goes on."""
        hub, client = self.make_ready()
        hub.on_intact(lambda: self.emit(hub, range(1)))
        hub.overdue()
        hub.turn()
        self.assertQueued(hub, 0)
        self.assertEqual(1, account(client.read()))

    def test_rest_of_a_line_wakes_the_loop_whatever_is_raised(self):
        hub, client = self.make_ready()

        def interrupt():
            if hub.rest:
                raise KeyboardInterrupt     # of a signal's handler

        hub.on_handed_over(interrupt)
        hub.asleep = True
        with self.kernel_takes(lambda _: 9):
            self.assertRaises(KeyboardInterrupt, self.emit, hub, range(1))
        self.assertEqual(1, hub.starts)
        hub.turn()
        self.assertEqual(1, account(client.read()))

    def test_close_in_a_signal_handler_amid_it(self):
        hub, client = self.start_hub()
        wait_until(lambda: hub.ready)
        hub.on_hand_over(hub.close)
        self.emit(hub, range(1))
        self.assertFalse(hub.thread.is_alive())
        self.assertFalse(os.path.exists(self.path))
        self.assertEqual([], client.read())
        self.assertTrue(client.ended)

    def test_exit_in_a_signal_handler_right_after_the_sends(self):
        """One stream took nothing, one a part, and one all of the line."""
        hub, *clients = self.make_ready(3)
        sizes = [-1, 9, len(line(0))]

        def handle(frame, event, function):
            """Where a signal that came amid a call in C is handled."""
            if event == 'c_return' and function.__name__ == 'extend':
                sys.setprofile(None)
                hub.finish()

        with self.kernel_takes(lambda size: sizes.pop(0) if sizes else size):
            sys.setprofile(handle)
            self.emit(hub, range(1))
        self.assertEqual([[], None], [sizes, hub.rest])
        self.assertEqual([(1, True)] * 3, [
            (account(each.read()), each.ended) for each in clients])

    def test_exit_waits_for_who_is_amid_it(self):
        """Or that would send by a number that is another file's by then."""
        self.patch('_EXIT_STALL', 0)
        hub, client = self.make_ready()
        amid, go_on = threading.Event(), threading.Event()

        def stand_still():
            amid.set()
            return go_on.wait(WAIT)

        hub.on_hand_over(stand_still)
        thread = threading.Thread(target=self.emit, args=(hub, range(1)))
        thread.start()
        amid.wait(WAIT)
        threading.Timer(0.05, go_on.set).start()
        hub.finish()
        self.assertTrue(go_on.is_set())
        thread.join()
        self.assertEqual(1, account(client.read()))
        self.assertTrue(client.ended)

    def test_threads_and_the_loop_hand_over_by_turns(self):
        """As often as can be: in order, each line once, all accounted for."""
        self.patch('_HAND_OVER_TIME', 0)
        self.switch_threads_often()
        hub, client = self.start_hub()
        sent = self.counted(unix_notifier._libc, 'send')

        def publish(thread):
            for number in range(100):
                hub.emit(message({'n': number, 'thread': thread}))
                time.sleep(random.choice((0, 0, 0, 1e-4)))

        self.run_threads([functools.partial(publish, each) for each in
                          range(40)] + [lambda: client.wait(4000)])
        self.assertLess(0, sent.call_count)
        for thread in range(40):
            self.assertEqual(list(range(100)), [
                each['payload']['n'] for each in client.messages
                if each['payload']['thread'] == thread])

    def test_signal_handlers_that_raise_neither_lose_nor_double(self):
        """What notify() took was sent, or is counted, once."""
        self.patch_drivers()
        driver = unix_notifier.UnixDriver(self.make_conf())
        self.addCleanup(unix_notifier._hubs.clear)
        self.addCleanup(driver._hub.close)
        self.await_service()
        client, struck = self.connect(), itertools.count()
        taken, perhaps = set(), set()

        def strike(*_):
            next(struck)
            raise ZeroDivisionError     # which notify() swallows

        self.addCleanup(signal.signal, signal.SIGALRM,
                        signal.signal(signal.SIGALRM, strike))
        for number in range(4000):
            try:
                signal.setitimer(signal.ITIMER_REAL,
                                 random.uniform(1e-6, 2e-4))
                driver.notify({}, numbered(number), 'INFO', None)
                taken.add(number)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except ZeroDivisionError:
                # Before notify() began, or once it had returned; and then it
                # may have dropped it behind the gap of another.
                perhaps.add(number)
        wait_until(lambda: driver._hub.asleep)  # it has looked at the gap
        driver.notify({}, numbered(number + 1), 'INFO', None)
        numbers = []
        while number + 1 not in numbers:
            client.receive()
            numbers = [each['payload']['n'] for each in client.messages
                       if 'n' in each['payload']]
        self.assertEqual(sorted(set(numbers)), numbers)
        missing = [len(each.difference(numbers))
                   for each in (taken, taken | perhaps)]
        self.assertTrue(missing[0] <= sum(lost(client.messages))
                        <= missing[1], missing)
        self.assertLess(100, next(struck))


# -- the desk: what lasts, what is told, what is open -------------------------

class BackoffTest(TestCase):

    def test_delay_doubles_to_a_second_with_jitter(self):
        backoff, shares = unix_notifier._Backoff(), set()
        self.assertIsNone(backoff.at)
        for delay in (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1, 1, 1):
            with fixtures.MonkeyPatch('time.monotonic', lambda: 100):
                backoff.fail()
            self.assertEqual((delay, delay == 1),
                             (backoff.delay, backoff.for_long()))
            shares.add((backoff.at - 100) / delay)
        self.assertTrue(0.49 < min(shares) < 0.95 < 1.01 > max(shares))
        backoff.clear()
        self.assertIsNone(backoff.at)
        backoff.fail()
        self.assertEqual(0.01, backoff.delay)


class AcceptTest(HubCase):

    """Hub: who comes and goes."""

    def test_coming_and_going_is_logged(self):
        self.patch('_VISITS_INTERVAL', 0)
        hub, client = self.make_served(sock_mode='0606')
        self.emit(hub, range(3))
        hub.turn()
        client.sock.close()
        hub.turn()
        for text in ('served with mode 0606, group unchanged, by pid %d'
                     % os.getpid(), 'subscriber connected: ' + self.who,
                     'subscriber parted: %s, 3 lines, 0 lost; it is gone'
                     % self.who):
            self.assertLogged('INFO MainThread Notifications on %s: %s\n' % (
                self.path, text))

    def test_who_comes_and_goes_within_a_second_shares_a_line(self):
        hub, _ = self.make_served()
        self.assertIsNone(hub.timeout)  # there is nothing to tell
        self.connect(hub).sock.close()
        hub.turn()
        self.assertLogged('subscriber ', 1)
        self.assertLess(hub.timeout, 1)
        # Not more than needed to tell it, though nothing else happens.
        hub.tell_visits_at -= 1
        hub.turn(None)
        self.assertIsNone(hub.timeout)
        self.assertLogged('subscriber connected: ' + self.who, 2)
        self.assertLogged('subscriber parted: ' + self.who)
        self.assertEqual(3, len(self.log.output.splitlines()))

    def test_crowd_is_counted_and_told_at_the_end(self):
        hub = self.make_hub()
        clients = [self.connect() for _ in range(100)]
        hub.turn()
        for each in clients:
            each.sock.close()
        hub.finish()
        self.assertLogged('subscribers connected: 64, refused: 36; most often '
                          '%s: 100 times\n' % self.who)
        self.assertLogged('subscribers parted: 64; most often %s: 64 times\n'
                          % self.who)

    def test_crowd_is_held_back_for_a_while(self):
        # By the kernel, for a turn must accept all who wait.
        hub = self.make_hub()

        def waiting():
            """How many the kernel lets wait."""
            with contextlib.ExitStack() as stack:
                for number in range(200):
                    sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                    sock.setblocking(False)
                    if sock.connect_ex(self.path):
                        break
            hub.turn()
            return number

        # The first were told of at once, so they do not count.
        self.assertEqual([129, 129, 129, 9], [waiting() for _ in range(4)])
        # However fast they come, a turn ends.
        listener = self.script(hub, *[self.connect] * 99)
        self.connect(hub)
        self.assertEqual(10, listener.accepts)
        listener.script.clear()
        hub.turn()
        for expected in 9, 129:
            hub.tell_visits_at = 0
            hub.turn()
            self.assertEqual(expected, waiting())

    def test_all_who_came_before_a_crowd_is_held_back_are_met(self):
        self.patch('_CROWD', 0)
        hub, late = self.make_hub(), []
        end = hub.on_crowd(lambda: end() or late.extend(
            self.connect() for _ in range(50)))
        self.connect(hub)
        self.assertServed(hub, *late)

    def test_crowd_of_many_is_told_in_few_words(self):
        pids = itertools.count(1)
        self.patch('_peer', lambda sock: ('pid %d' % next(pids), 7))
        hub = self.make_hub(sock_max_subscribers=100)
        clients = [self.connect() for _ in range(100)]
        hub.turn()
        self.assertLogged('subscribers connected: 100; most often')
        self.assertLess(max(map(len, self.log.output.splitlines())), 500)
        self.assertServed(hub, *clients)

    def test_who_comes_or_talks_in_a_loop_has_a_turn_now_and_then(self):
        self.patch('_REST', 0.02)
        self.patch('_REST_MAX', 0.06)
        hub, client = self.make_served()
        for act in lambda: client.sock.send(b'x'), self.connect:
            begin = time.monotonic()
            for _ in range(10):
                act()
                hub.turn()
            self.assertGreater(time.monotonic() - begin, 5 * 0.02)

    def test_who_comes_now_and_then_has_a_turn_at_once_however_busy(self):
        self.patch('_REST', 0)      # so that nobody comes without a pause
        hub, naps = self.make_hub(), []
        with fixtures.MonkeyPatch('time.sleep', naps.append), (
                fixtures.MonkeyPatch('time.thread_time',
                                     lambda: time.monotonic() / 2)):
            for _ in range(3):
                self.connect(hub)
                hub.turn()
        self.assertEqual([], naps)

    def test_who_is_refused_in_a_loop_costs_little(self):
        """All are asked once a turn whether they are there, not by each."""
        hub, *places = self.make_served(40, sock_max_subscribers=40)
        crowd = [self.connect() for _ in range(40)]
        sends = self.counted(unix_notifier._libc, 'send')
        records = self.counted(unix_notifier, '_record')
        hub.turn()
        # To each one place and two to each that comes; none gives up the GIL.
        self.assertEqual(40 + 2 * 40, sends.call_count)
        self.assertEqual(1, records.call_count)
        for each in crowd:
            self.assertEqual('sock_max_subscribers is 40', each.refusal())
        places.pop(0).sock.close()      # and so has left it to another
        hub.turn()
        self.assertServed(hub, *places, self.connect(hub))

    def test_users_share_the_places(self):
        hub = self.make_hub(sock_max_subscribers=5)
        uids = iter((1, 1, 1, 1, 1, 2, 2, 2, 3, 1))
        self.patch('_peer', lambda sock: ('someone', next(uids)))
        ones = [self.connect(hub) for _ in range(5)]
        self.emit(hub, range(1), size=1 << 20)
        hub.turn()
        self.pump(hub, ones[4], 1)
        ones[4].messages.clear()
        ones[3].receive(1 << 16)    # and there is room, for half a line
        # The newest, which had got all, and the one before, amid a line.
        twos = [self.connect(hub) for _ in range(2)]
        self.assertIn('fewer', ones[4].refusal())
        self.assertEqual(([], True), (ones[3].read(), ones[3].ended))
        # It would have more than are left to the other.
        self.assertIn('is 5', self.connect(hub).refusal())
        three = self.connect(hub)
        self.assertEqual(([], True), (ones[2].read(), ones[2].ended))
        self.assertIn('is 5', self.connect(hub).refusal())
        for each in ones[:2]:
            self.pump(hub, each, 1)
            each.messages.clear()
        self.assertServed(hub, *ones[:2], *twos, three)

    def test_who_is_found_dead_is_seen_off_without_an_event(self):
        hub, client = self.make_served()
        client.sock.shutdown(socket.SHUT_WR)
        hub.turn()      # now it is not watched
        client.sock.close()
        self.emit(hub, range(1))
        hub.turn()
        with self.assertPrompt():
            hub.turn(WAIT)
        self.assertEqual([], hub.subscribers)

    def test_half_closed_stays_but_a_ghost_gives_up_its_place(self):
        hub = self.make_hub(sock_max_subscribers=2)
        half = self.connect(hub)
        for _ in range(2):
            ghost = self.connect(hub)
            for each in ghost, half:
                each.sock.shutdown(socket.SHUT_WR)
            hub.turn()
            ghost.sock.close()
            self.assertFalse(hub.turn())    # nothing spins
        self.assertServed(hub, half, self.connect(hub))
        half.sock.close()
        self.emit(hub, range(1))            # finds out
        self.assertTrue(hub.turn())         # another will see it off
        self.assertFalse(hub.turn())
        self.assertEqual(1, len(hub.subscribers))

    def test_who_cannot_be_watched_is_parted_or_is_watched_later(self):
        self.patch('_VISITS_INTERVAL', 0)
        hub, other = self.make_served()
        fails = mock.patch.object(
            hub.selector, 'register', autospec=True,
            side_effect=OSError(errno.ENOSPC, 'too many are watched'))
        with fails:
            client = self.connect(hub)
        self.assertEqual(([], True), (client.read(), client.ended))
        hub.turn()
        self.assertLogged('0 lost; too many are watched')
        self.assertServed(hub, other, self.connect(hub))
        # For some there is nothing to watch for, until they take no more.
        other.sock.shutdown(socket.SHUT_WR)
        hub.turn()
        other.messages.clear()
        self.emit(hub, range(1), size=2 ** 20)
        with fails:
            self.assertRaises(OSError, hub.turn)
        self.pump(hub, other, 1)

    def test_who_has_gone_while_it_waited_takes_no_place(self):
        """Neither a free one nor that of a user who has more."""
        uids = iter((1, 1, 1, 2))
        self.patch('_peer', lambda sock: ('someone', next(uids)))
        hub, one = self.make_served(sock_max_subscribers=2)
        self.connect().sock.close()
        other = self.connect(hub)
        self.connect().sock.close()
        self.assertServed(hub, one, other)

    def test_who_passes_descriptors_is_refused_or_cut_off(self):
        for guarded in unix_notifier._guarded(), False:
            if not guarded:
                self.patch('_guarded', lambda: False)
            hub = self.make_hub()
            clients = [self.connect() for _ in range(3)]
            hub.turn()
            for client in clients:
                client.sock.send(b'x')
            for client in *clients[1:], self.connect():
                reading, writing = os.pipe()
                self.addCleanup(os.close, reading)
                try:
                    socket.send_fds(client.sock, [b'xx'], [writing])
                    self.assertFalse(guarded)
                except PermissionError:
                    self.assertTrue(guarded)
                os.close(writing)
                # At last, whatever closes it.
                wait_until(lambda: hub.turn() or True and select.select(
                    [reading], [], [], 0.01)[0])
            self.assertServed(hub, clients[0])
            self.assertEqual(1 + 3 * guarded, len(hub.subscribers))
            hub.finish()

    def test_what_takes_long_to_close_holds_nobody_up(self):
        for guarded in unix_notifier._guarded, lambda: False:
            self.patch('_guarded', guarded)
            hub, quiet, talker = self.make_served(2)
            with lingering() as give, lingering() as give_late, (
                    socket.socket(socket.AF_UNIX)) as sock:
                with self.assertPrompt():
                    give(talker.sock)
                    hub.turn()
                    # By one, too, that waits at a listener which is closed.
                    late = self.path + '.late'
                    os.rename(self.path, late)
                    end = hub.on_close_listener(
                        lambda: sock.connect(late) or give_late(sock))
                    hub.look_again()
                    end()
                    self.assertServed(hub, quiet)
                with contextlib.suppress(ConnectionResetError):
                    self.assertEqual(b'', sock.recv(1))
            hub.finish()

    def test_what_comes_out_of_band_does_not_spin(self):
        for guarded in unix_notifier._guarded, lambda: False:
            self.patch('_guarded', guarded)
            hub, client = self.make_served()
            for data in b'a', b'bc':
                client.sock.send(data, socket.MSG_OOB)
                hub.turn()
                hub.turn()
                self.assertFalse(hub.turn())
            self.assertServed(hub, client)
            hub.finish()

    def test_gone_in_the_middle_of_a_line_parts_quietly(self):
        hub, gone, other = self.make_served(2)
        self.emit(hub, range(1), size=1 << 20)
        hub.turn()
        gone.sock.recv(100)
        gone.sock.close()
        self.pump(hub, other, 1)
        subscriber, = hub.subscribers
        self.assertLogged('WARNING', 0)
        # An event that was there before it parted is too late.
        hub.late_event(subscriber)

    def test_failed_connection_is_passed_over(self):
        hub = self.make_hub()
        self.script(hub, errno.ECONNABORTED, errno.EPERM)
        self.assertServed(hub, self.connect(hub))
        self.assertLogged('WARNING', 0)

    def test_without_descriptors_they_are_refused_with_a_reason(self):
        hub = self.make_hub()
        served, listener = self.connect(hub), self.script(hub)
        refused = [self.connect() for _ in range(3)]
        with no_descriptors():
            for number in range(3):
                self.emit(hub, [number])
                hub.turn()
        for each in refused:
            self.assertEqual('the service is out of file descriptors',
                             each.refusal())
        self.assertLogged('WARNING MainThread Notifications on %s: subscribers'
                          ' are refused since 20' % self.path)
        self.assertLessEqual(listener.accepts, 2 * 4)   # no spin
        # Nor is it told time and again while some get in.
        others = [self.connect(hub) for _ in range(2)]
        self.connect()
        with no_descriptors():
            hub.turn()
        self.assertLogged('accepted again', 0)
        self.assertLogged(' are refused since ')
        self.assertServed(hub, served, *others, self.connect(hub))
        hub.tell_visits_at = 0
        hub.turn()
        self.assertLogged('subscribers are accepted again')
        self.assertEqual(3, account(served.messages[:3]))

    def test_that_they_are_refused_is_told_again(self):
        hub = self.make_hub()
        self.connect()
        with no_descriptors():
            hub.reserve.close()
            self.addCleanup(os.close, os.dup(0))    # another is faster
            hub.reserve = None
            self.assertEqual([5, 15, 35, 75], self.said(
                hub, 'subscribers are refused since 20', 100, 5))

    def test_without_a_reserve_accepting_pauses(self):
        for reserve in ('taken', None):
            hub = self.make_hub()
            listener = self.script(hub, errno.EMFILE, errno.EMFILE)
            if reserve is None:     # there was none to begin with
                hub.reserve = None
                listener.script.pop()
            client = self.connect(hub)
            accepts = listener.accepts
            hub.retry_at += WAIT
            for _ in range(5):
                self.assertFalse(hub.turn())    # neither spins nor accepts
            self.assertEqual(accepts, listener.accepts)
            hub.retry_at = time.monotonic()
            hub.turn()
            # It missed what came meanwhile.
            self.assertIn('descriptors', client.refusal())
            client = self.connect()
            self.assertTrue(hub.turn())     # the listener is watched
            self.assertServed(hub, client)
            self.assertIsNone(hub.retry_at)
            hub.finish()

    def test_all_whom_the_kernel_holds_are_met_though_one_try_fails(self):
        hub = self.make_hub(sock_max_subscribers=1000)
        clients = [self.connect()
                   for _ in range(unix_notifier._BACKLOG + 1)]
        self.script(hub, errno.EMFILE)
        self.emit(hub, range(1))
        hub.turn()
        # None is left to hear of what comes later alone.
        for each in clients:
            self.assertIn('descriptors', each.refusal())

    def make_paused(self, *script):
        """A hub that can neither accept nor refuse for now, and who waits."""
        hub = self.make_hub()
        self.script(hub, *script, errno.EMFILE, errno.EMFILE)
        client = self.connect(hub)
        self.assertTrue(hub.called_last)
        return hub, client

    def test_pause_ends_though_nobody_waits(self):
        # accept() may say so when it has taken the last one.
        hub, client = self.make_paused(None)
        hub.retry_at = time.monotonic()
        hub.turn()
        # Else the loop would spin.
        self.assertEqual((None, False), (hub.retry_at, hub.called_last))
        self.assertServed(hub, client, self.connect(hub))

    def test_path_taken_while_accepting_pauses_is_given_up(self):
        hub, _ = self.make_paused()     # without a reserve, too
        self.take_over()
        hub.look_again()
        self.assertFalse(hub.served)

    def test_path_lost_while_accepting_pauses_comes_back(self):
        hub, _ = self.make_paused()
        os.unlink(self.path)
        hub.look_again(2)
        self.assertServed(hub, self.connect(hub))


# -- who serves the path ------------------------------------------------------

class PathTest(HubCase):

    """Hub: the path, in trouble and well again."""

    @contextlib.contextmanager
    def trouble(self, hub, *texts):
        """It is told once, and once when it is over; notify() just drops."""
        hub.look_again(9)       # nor for what may pass within a second
        if not hub.served:
            self.emit(hub, range(3))
            self.assertQueued(hub, 0)
        self.assertNames(self.log.output, *texts)
        self.assertLessEqual(hub.retry_at, time.monotonic() + 1)
        self.assertLogged('all is well again', 0)
        yield
        hub.look_again(3)
        self.assertIsNone(hub.retry_at)
        self.assertLogged('; trying again')
        self.assertLogged('all is well again')
        self.assertServed(hub, self.connect(hub))

    def test_trouble_that_lasts_is_told_again(self):
        os.rmdir(self.dir)
        hub = self.make_hub(served=False)
        self.assertEqual(
            [10, 30, 70, 150, 310, 630, 1270, 2550, 5110, 8710],
            self.said(hub, '; trying again since 20', 10000, 5))
        os.mkdir(self.dir)
        hub.checked_at = 0
        hub.look_again()
        # Once more where it takes long to come so far.
        self.assertRegex(
            self.log.output, 'all is well again: served with mode 0660, group '
            'unchanged, by pid %d; tried 200[12] times since 20' % os.getpid())
        self.assertNames(self.log.output.splitlines()[-1], '[Errno 2]',
                         self.dir)

    def test_troubles_that_take_turns_are_told_once_each(self):
        hub, client = self.make_served()
        os.unlink(self.path)
        for _ in range(3):
            touch(self.path)
            hub.look_again()
            os.rename(self.dir, self.dir + '2')
            hub.look_again()
            os.rename(self.dir + '2', self.dir)
        self.assertLogged('; trying again', 2)
        self.assertServed(hub, client)

    def test_who_serves_is_told_again(self):
        hub = self.make_hub()
        text = 'served with mode 0660, group unchanged, by pid %d, since 20'
        self.assertEqual(
            [13, 86424, 172835],    # none of which is due on the dot
            self.said(hub, text % os.getpid(), 200000, 13))

    def test_who_serves_is_told_again_though_notify_does_the_work(self):
        self.patch('_AGAIN', 0)
        self.patch('_CHECK_INTERVAL', 0)
        hub, client = self.make_served()
        self.emit(hub, range(1))
        self.pump(hub, client, 1)
        self.assertLogged(', since 20')

    def troubles(self):
        """What begins and what ends one, files meanwhile, what it is told."""
        lock, others = self.path + '.lock', []
        yield (lambda: os.rmdir(self.dir), lambda: os.mkdir(self.dir),
               [], self.dir, 'No such file')
        yield (lambda: touch(self.path), lambda: os.unlink(self.path),
               ['s', 's.lock'], self.path, 'not a socket', 'left alone')
        yield (lambda: os.symlink('/dev/null', lock), lambda: os.unlink(lock),
               ['s.lock'], lock)
        yield (lambda: others.append(listen(self.path, 64)),
               lambda: self.connect() and others.pop().close(),
               ['s', 's.lock'], self.path, 'another program')
        yield (lambda: others.append(self.make_hub()),
               lambda: others.pop().finish(), ['s', 's.lock'],
               lock, 'held; its last owner was process %d' % os.getpid())
        for name, effect, text in (
                ('grp.getgrnam', KeyError, 'sock_group: no such group'),
                ('socket.socket.listen', OSError(errno.EACCES, 'Denied'),
                 'Denied'),
                ('os.pwrite', OSError(errno.ENOSPC, 'No space'), 'No space'),
                ('os.pwrite', lambda _, data, at: len(data) - 1, 'No space')):
            call = mock.patch(name, autospec=True, side_effect=effect)
            yield call.start, call.stop, ['s.lock'], text
        if os.geteuid() == 0:
            yield (lambda: os.chown(self.dir, NOBODY, -1),
                   lambda: os.chown(self.dir, 0, -1),
                   [], self.dir, 'uid %d' % NOBODY)

    def test_what_keeps_it_from_the_path_is_told_and_waited_for(self):
        warnings = self.useFixture(fixtures.WarningsCapture()).captures
        self.addCleanup(mock.patch.stopall)
        mine = grp.getgrgid(os.getgid()).gr_name
        for begin, end, files, *texts in self.troubles():
            begin()
            hub = self.make_hub(False, sock_group=mine)
            with self.trouble(hub, *texts):
                self.assertEqual((files, False), (sorted(glob.glob(
                    's*', root_dir=self.dir)), hub.holds_lock), texts)
                end()
            hub.finish()
            self.assertEqual([], warnings)
            self.log.reset_output()
            os.unlink(self.path + '.lock')

    def test_loop_heals_without_being_asked(self):
        os.rmdir(self.dir)
        hub = self.make_threaded()
        hub.start()
        wait_until(lambda: hub.retry_at)
        os.mkdir(self.dir)
        wait_until(lambda: hub.served)

    def test_deleted_path_is_bound_again_and_subscribers_stay(self):
        hub = self.make_hub()
        clients = [self.connect(hub), self.connect()]   # one is not accepted
        os.unlink(self.path)
        end = hub.on_work(self.spy(hub))    # the gate stays open
        hub.look_again()
        end()
        self.assertServed(hub, *clients, self.connect(hub))
        self.assertLogged('served with', 2)

    def test_deleted_path_is_noticed_by_notify(self):
        hub = self.make_hub()
        for starts in (0, 1, 2):
            self.emit(hub, range(1))
            self.assertEqual(starts, hub.starts)
            hub.overdue()
        hub.turn()
        self.emit(hub, range(1))
        self.assertEqual(2, hub.starts)
        self.assertQueued(hub, 0)

    def test_lost_lock_is_taken_again(self):
        hub, client = self.make_served()
        os.unlink(self.path + '.lock')
        other = self.make_hub(False)    # is quicker, but spares our socket
        hub.look_again(2)
        other.look_again(2)
        self.assertFalse(other.served)
        self.assertTrue(hub.holds_lock)
        self.assertEqual(hub.identity, hub.lock.read()['/s'])
        self.assertLogged('served with')
        os.close(hub.lock.fd)           # as others may
        hub.look_again(2)
        self.assertTrue(hub.holds_lock)
        self.assertServed(hub, client, self.connect(hub))

    def test_who_lost_the_lock_alone_keeps_serving(self):
        hub, client = self.make_served()
        os.unlink(self.path + '.lock')
        other = unix_notifier._Lock(self.path + '.lock')
        other.acquire()
        with self.trouble(hub, 'held; its last owner'):
            self.assertServed(hub, client, self.connect(hub))
            other.close()
        self.assertLogged(': served with', 2)   # once when all was well

    def test_who_lost_lock_and_path_sends_subscribers_on(self):
        self.patch('_VISITS_INTERVAL', 0)
        hub, client = self.make_served()
        other = self.take_over()
        hub.on_close_listener(self.spy(hub))    # the gate is still open
        hub.look_again(2)
        self.assertEqual(([], True), (client.read(), client.ended))
        self.assertFalse(hub.served)
        self.assertLogged('another process took the path')
        hub.look_again(9)
        self.assertFalse(hub.gate_open)
        self.assertServed(other, self.connect(other))

    def test_dead_processs_path_is_taken_over(self):
        def serve_and_die():
            SteppedHub(self.make_settings()).turn()

        self.assertEqual('', in_child(serve_and_die))
        self.assertTrue(os.path.exists(self.path))
        hub = self.make_hub()
        self.assertServed(hub, self.connect(hub))


# -- the loop -----------------------------------------------------------------

class WakeTest(HubCase):

    """Hub: the loop sleeps, and no line is left lying meanwhile."""

    def make_woken_hub(self):
        hub = SteppedHub(self.make_settings())
        self.addCleanup(hub.finish)
        hub.waker = unix_notifier._Event()
        hub.turn()
        return hub, self.connect(hub)

    def test_line_that_comes_as_the_loop_falls_asleep_is_seen(self):
        """Before the flag is up, or late: between that and the sleep."""
        for late in False, True:
            hub, client = self.make_woken_hub()
            if late:
                hub.on_select(lambda timeout: self.emit(hub, range(1))
                              if timeout else None)
            else:
                hub.on_asleep(lambda: self.emit(hub, range(1)))
            with self.assertPrompt():
                hub.turn(WAIT)
            self.assertEqual(1, account(client.read()), late)
            hub.finish()

    def test_idle_loop_sleeps_until_it_is_woken_and_that_once(self):
        (hub, _), timeouts = self.make_woken_hub(), []
        hub.turn()
        end = hub.on_select(lambda timeout: timeouts.append(timeout) or [])
        hub.turn(None)
        end()
        self.assertIsNone(timeouts[0])
        self.emit(hub, range(5))        # while it is awake
        self.assertEqual([], select.select([hub.waker], [], [], 0)[0])
        hub.asleep = True
        self.emit(hub, range(5))
        self.assertEqual(1, os.eventfd_read(hub.waker.fileno()))

    def test_rest_is_sent_without_a_wait(self):
        self.patch('_CHUNK_MAX', 500)
        self.patch('_SEND_MAX', 1000)
        hub, client = self.make_woken_hub()
        self.emit(hub, range(50))
        with self.assertPrompt():
            while account(client.read()) < 50:
                hub.turn(WAIT)

    def test_no_wake_up_is_missed(self):
        self.switch_threads_often()
        hub, client = self.start_hub()
        for number in range(600):
            sys.setswitchinterval((1e-6, 1e-4, 5e-3)[number % 3])
            self.emit(hub, [number])
            self.assertEqual(number + 1, account(client.wait(number + 1)))

    def test_thread_that_could_not_start_is_tried_again(self):
        hub = self.make_threaded()
        with fixtures.MonkeyPatch('threading.Thread.start', none_left):
            self.emit(hub, range(1))
        wait_until(lambda: self.emit(hub, range(1)) or hub.served)

    def test_loop_whose_start_was_interrupted_is_known(self):
        """And is started again if it never began."""
        def interrupted(thread, start=threading.Thread.start):
            if began:
                start(thread)
            raise KeyboardInterrupt     # of a signal's handler

        for began, name in ((True, 'threading.Thread.start'),
                            (False, unix_notifier.__name__ + '._start')):
            hub = self.make_threaded()
            with fixtures.MonkeyPatch(name, interrupted):
                self.assertRaises(KeyboardInterrupt, hub.start)
            if not began:
                hub.start()
            self.await_service()
            hub.close()
            self.assertFalse(hub.thread.is_alive())
            self.assertFalse(os.path.exists(self.path))
            self.log.reset_output()

    def test_close_before_the_loop_has_started(self):
        hub = self.make_threaded()
        with fixtures.MonkeyPatch('threading.Thread.start', lambda _: None):
            hub.start()
        hub.close()

    def test_surprise_in_the_loop_is_logged_and_survived(self):
        self.patch('_Backoff.MAX', 0.01)
        hub, client = self.start_hub()
        hub.hand_over(False)
        failures = [ZeroDivisionError()] * 3

        def fail():
            if failures:
                raise failures.pop()

        hub.on_flush(fail)
        self.emit(hub, range(1))
        self.assertEqual(1, account(client.wait(1)))
        self.assertLogged('Traceback')


class EndTest(HubCase):

    """Hub: close() and fork."""

    def test_close_sends_what_is_queued_and_leaves_the_lock(self):
        hub, client = self.start_hub()
        held = hub.subscribers[0].sock.dup()    # as by a child
        self.addCleanup(held.close)
        files = open_files()
        self.emit(hub, range(100))
        hub.close()
        self.assertEqual((100, True), (account(client.read()), client.ended))
        self.assertEqual(['s.lock'], os.listdir(self.dir))
        # Listener, lock, selector, subscriber, reserve.
        self.assertLessEqual(len(open_files()), len(files) - 5)
        hub.close()
        hub.start()
        self.emit(hub, range(3))
        self.assertQueued(hub, 0)

    def test_close_serves_who_has_connected_by_then(self):
        hub = self.make_hub()
        client = self.connect()
        self.emit(hub, range(2))
        hub.overdue()
        hub.finish()
        self.assertEqual(2, account(client.read()))
        self.assertLogged('served with')    # not again

    def test_close_waits_for_a_reader_but_not_for_a_stalled_one(self):
        self.patch('_EXIT_TIME', WAIT)
        self.patch('_EXIT_STALL', 0.5)
        hub, slow = self.start_hub()
        self.connect()
        self.emit(hub, range(5), size=1 << 20)
        reader = threading.Thread(target=slow.wait, args=(5,))
        reader.start()
        with self.assertPrompt():
            hub.close()
        reader.join(WAIT)
        self.assertEqual(5, account(slow.messages))

    def test_close_waits_for_one_that_reads_slowly(self):
        hub, client = self.make_served()
        self.emit(hub, range(1), size=300 << 10)
        hub.turn()
        # The kernel takes more only once most of what it has was read.
        hub.on_turn(before=lambda: client.receive(50000))
        hub.finish()
        self.assertEqual(1, account(client.read()))

    def test_close_ends_though_there_is_progress(self):
        self.patch('_EXIT_TIME', 0.2)
        self.patch('_DISCARD_MAX', 1 << 30)
        hub, client = self.start_hub()
        self.connect()      # never reads
        self.emit(hub, range(5), size=1 << 20)

        def talk():
            with contextlib.suppress(OSError):
                while True:
                    client.sock.send(b'x' * 16)

        talker = threading.Thread(target=talk)
        talker.start()
        with self.assertPrompt():
            hub.close()
        talker.join(WAIT)

    def test_close_grants_the_stall_though_the_path_is_in_trouble(self):
        self.patch('_EXIT_STALL', 0.3)
        hub = self.make_hub()
        self.connect(hub)
        self.emit(hub, range(5), size=1 << 20)
        os.rename(self.dir, self.dir + '2')
        hub.look_again()
        before = time.monotonic()
        hub.finish()
        self.assertGreaterEqual(time.monotonic() - before, 0.3)

    def test_close_does_not_wait_for_a_loop_that_is_stuck(self):
        self.patch('_EXIT_TIME', 0.1)
        hub, _ = self.start_hub()
        stuck, go = threading.Event(), threading.Event()
        hub.on_work(lambda: stuck.set() or go.wait(WAIT))
        hub.waker.set()
        self.assertTrue(stuck.wait(WAIT))
        with self.assertPrompt():
            hub.close()
        go.set()
        hub.thread.join(WAIT)

    @as_root
    def test_close_delivers_though_the_file_cannot_be_removed(self):
        hub, client = self.make_served()
        self.emit(hub, range(2))
        os.chmod(self.dir, 0o755)
        with as_uid(NOBODY):
            hub.finish()
        self.assertEqual((2, True), (account(client.read()), client.ended))

    def test_without_a_thread_close_does_its_work(self):
        before = open_files()
        self.useFixture(fixtures.MonkeyPatch(
            'threading.Thread.start', none_left))
        hub = SteppedHub(self.make_settings(), stepped=False)
        self.emit(hub, range(1))    # before it is known
        hub.start()
        self.emit(hub, range(3))    # nobody can be there
        self.assertQueued(hub, 1)
        hub.close()
        self.assertLogged('served with')
        self.assertEqual(['s.lock'], os.listdir(self.dir))
        del hub
        self.assertEqual(before, open_files())

    def test_child_hands_nothing_over_by_a_number_of_its_parents(self):
        """A green thread that was amid notify() goes on in the child."""
        hub, client = self.make_served()
        hub.hand_over(True)
        self.assertTrue(hub.ready)

        def child():
            hub.abandon(certain=True)
            self.emit(hub, range(1))
            if hub.ready or not hub.queued:
                raise AssertionError

        self.assertEqual('', in_child(child))
        self.assertServed(hub, client)

    def test_child_closes_what_it_inherited_and_the_parent_notices_nothing(
            self):
        hub, client = self.make_served(sock_buffer_size=65536)
        self.emit(hub, range(70))
        count = len(open_files())

        def child():
            hub.abandon(certain=True)
            # Listener, lock, selector, subscriber, reserve; a pipe is new.
            self.assertEqual(count - 5 + 1, len(open_files()))
            hub.close()         # the parent's business

        self.assertEqual('', in_child(child))
        self.pump(hub, client, 70)
        self.assertServed(hub, client)
        self.assertTrue(hub.owns_path and hub.holds_lock)
        self.connect(hub).sock.close()
        self.assertTrue(hub.turn())     # the selector still tells

    def test_child_without_a_hook_closes_no_number_that_was_given_anew(self):
        hub = self.make_hub()
        self.connect(hub)
        ours = hub.descriptors
        self.assertGreater(len(ours), 3)

        def child(reuse):
            for number in ours[::2] if reuse else ():
                os.dup2(1, number)
            hub.abandon(certain=False)
            for place, number in enumerate(ours):
                if reuse and place % 2 == 0:
                    os.close(number)
                else:
                    self.assertRaises(OSError, os.close, number)
            os.close(hub.selector.fileno())       # it may be anybody's

        for reuse in (False, True):
            self.assertEqual('', in_child(functools.partial(child, reuse),
                                          ctypes.PyDLL(None).fork))


def in_turn(test, cases):
    """The cases; if the test fails amid one, the failure names it."""
    for each in cases:
        test.addDetail('case', content.text_content(repr(each)[:500]))
        yield each
    test.getDetails().pop('case', None)


# -- the driver -------------------------------------------------------------

class DriverCase(TestCase):

    """Gives each test drivers whose hubs speak as the tests do."""

    def setUp(self):
        super().setUp()
        self.patch('_hubs', {})
        self.addCleanup(unix_notifier._at_exit)
        self.patch_drivers()
        self.conf = self.useFixture(config_fixture.Config(cfg.CONF)).conf

    def hubs(self):
        return list(unix_notifier._hubs.get(os.getpid(), {}).values())

    def configure_globally(self, path):
        self.conf.register_opts(
            [cfg.StrOpt('sock_path', help='Another help.')], group=GROUP)
        self.conf.set_override('sock_path', path, group=GROUP)

    def notify(self, driver, payload=None):
        driver.notify({}, message(payload or {'n': 0}), 'INFO', None)

    def serve(self, **options):
        driver = unix_notifier.UnixDriver(self.make_conf(**options))
        self.await_service()
        return driver


class DriverTest(DriverCase):

    def test_construct_without_conf_touches_nothing(self):
        before = threading.active_count(), open_files()
        unix_notifier.UnixDriver()
        self.assertEqual(before, (threading.active_count(), open_files()))
        self.assertEqual(([], ''), (self.hubs(), self.log.output))

    def test_first_notify_without_conf_takes_the_global_one(self):
        """And logs nothing itself: a handler may be what notifies."""
        driver, threads = unix_notifier.UnixDriver(), []

        class Handler(logging.Handler):
            def emit(handler, record):
                threads.append(record.threadName)
                self.notify(driver)

        logging.getLogger().addHandler(handler := Handler())
        self.addCleanup(logging.getLogger().removeHandler, handler)
        self.configure_globally(self.path)
        for _ in range(3):
            self.notify(driver)
        self.await_service()
        self.assertNotIn('MainThread', threads)
        client = self.connect()
        self.notify(driver)
        # The first were dropped, or were on their way.
        wait_until(lambda: client.read())

    def test_bad_global_conf_is_logged_once_by_a_thread(self):
        self.configure_globally('relative')
        driver = unix_notifier.UnixDriver()
        with fixtures.MonkeyPatch('threading.Thread.start', none_left):
            self.notify(driver)
        self.assertEqual('', self.log.output)
        for _ in range(3):      # now there are threads
            self.notify(driver)
        wait_until(lambda: self.log.output)
        self.assertLogged("'relative'")
        self.assertLogged('MainThread', 0)
        self.assertEqual([], self.hubs())

    def test_what_keeps_it_from_starting_is_told_once_and_heals(self):
        self.patch('_CHECK_INTERVAL', 0.01)
        self.patch('_Backoff.MAX', 0.01)
        encode = self.useFixture(fixtures.MockPatch(
            'unix_notifier._encode', wraps=unix_notifier._encode)).mock

        def fail(*args, **kwargs):
            raise OSError(errno.EPERM, 'told to fail')

        for number, (name, failing, thread) in enumerate(in_turn(self, (
                ('socket.socket', fail, 'unix-notifier'),
                ('os.eventfd', fail, 'unix-notifier'),
                ('selectors.DefaultSelector', fail, 'unix-notifier'),
                ('fcntl.flock', fail, 'unix-notifier'),
                ('threading.Thread.start', none_left, 'MainThread')))):
            self.path = os.path.join(self.dir, str(number))
            encode.reset_mock()
            with fixtures.MonkeyPatch(name, failing):
                driver = unix_notifier.UnixDriver(self.make_conf())
                text = 'WARNING %s Notifications on %s: ' % (
                    thread, self.path)
                wait_until(lambda: text in self.log.output)
                for _ in range(100):
                    self.notify(driver)
                self.assertEqual(0, encode.call_count)
            wait_until(lambda: self.notify(driver) or (
                self.path + ': all is well again: served' in self.log.output))
            self.assertLogged('; trying again', number + 1)
            client = self.connect()
            self.notify(driver)
            wait_until(lambda: client.read())   # or it was on its way

    def test_its_threads_take_no_signal(self):
        masks, before = [], signal.pthread_sigmask(signal.SIG_BLOCK, ())

        def spy(*_):    # in the thread, before it runs anything of ours
            sys.setprofile(None)
            masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))

        self.addCleanup(threading.setprofile, None)
        threading.setprofile(spy)
        self.serve()
        self.configure_globally('relative')
        self.notify(unix_notifier.UnixDriver())
        wait_until(lambda: len(masks) == 2)
        for mask in masks:
            self.assertEqual(
                {signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV,
                 signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP,
                 signal.SIGSYS}, signal.valid_signals() - mask)
        with fixtures.MonkeyPatch('threading.Thread.start', none_left):
            unix_notifier.UnixDriver(self.make_conf(self.path + '2'))
        # Others may run in this thread while a green one is started.
        with fixtures.MonkeyPatch('threading.Thread.start', spy), (
                fixtures.MonkeyPatch('_thread.start_new_thread', spy)):
            unix_notifier.UnixDriver(self.make_conf(self.path + '3'))
        self.assertEqual([before, before], [masks[-1], signal.pthread_sigmask(
            signal.SIG_BLOCK, ())])

    def test_signal_that_the_service_waits_for_is_left_to_it(self):
        numbers = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP,
                   signal.SIGUSR1, signal.SIGCHLD}

        def child():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
            self.serve()
            signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
            for number in numbers:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
                self.assertTrue(signal.sigtimedwait({number}, WAIT))

        self.assertEqual('', in_child(child))

    def test_first_notify_out_of_stack_does_not_count(self):
        self.conf.register_opt(cfg.StrOpt('state', default=self.dir))
        self.configure_globally('$state/s')
        drivers = []

        def prepare():
            drivers.append(unix_notifier.UnixDriver())
            return functools.partial(drivers[-1].notify, {}, numbered(0),
                                     'INFO', None)

        refused = list(self.at_every_depth(prepare)).count(False)
        self.assertIn(refused, (1, 1 + bool(sys.gettrace())))
        self.await_service()
        client = self.connect()
        for number, driver in enumerate(drivers, 1):
            self.notify(driver, {'n': number})
        # Some of the first may have been on their way.
        wait_until(lambda: client.read()[-1:] and account(
            [each for each in client.messages if each['payload']['n']], 1)
            == len(drivers) + 1)
        self.assertLogged('No notifications', 0)

    def test_drivers_of_a_path_share_one_hub(self):
        """One that differs is told that the first counts."""
        drivers = [self.serve(sock_max_subscribers=3) for _ in range(5)]
        hub, = self.hubs()
        self.assertEqual({hub}, {each._hub for each in drivers})
        self.assertEqual(1, [each.name for each in threading.enumerate()]
                         .count('unix-notifier'))
        self.assertLogged('configured twice', 0)
        self.serve(sock_max_subscribers=4)
        self.assertEqual([hub], self.hubs())
        self.assertEqual(3, hub.settings.max_subscribers)
        self.assertLogged('configured twice')
        self.assertNames(self.log.output, 'max_subscribers=3',
                         'max_subscribers=4', self.path)
        self.path += '2'
        self.assertIsNot(hub, unix_notifier.UnixDriver(
            self.make_conf())._hub)

    def test_copies_share_the_hub(self):
        driver, client = self.serve(), self.connect()
        for number, each in enumerate(in_turn(self, (
                copy.copy(driver), copy.deepcopy(driver),
                pickle.loads(pickle.dumps(driver)),
                pickle.loads(pickle.dumps(unix_notifier.UnixDriver(
                    self.make_conf(), ['topic'], threading.Lock())))))):
            self.notify(each, {'n': number})
            self.assertEqual(number + 1, account(client.wait(number + 1)))
        self.assertEqual(1, len(self.hubs()))
        pickle.dumps(unix_notifier.UnixDriver())

    def test_what_cannot_be_serialized_is_counted(self):
        driver, client = self.serve(), self.connect()
        encode = unix_notifier._encode

        def no_memory(message, *args):
            if message['payload'] == 'huge':
                raise MemoryError
            return encode(message, *args)

        self.patch('_encode', no_memory)
        self.notify(driver)
        self.assertEqual(1, account(client.wait(1)))
        wait_until(lambda: driver._hub.asleep)
        self.notify(driver, 'huge')
        self.assertEqual(2, account(client.wait(2)))
        self.notify(driver, {'n': 2})
        self.assertEqual(3, account(client.wait(3)))
        self.assertEqual([1], lost(client.messages))

    def at_every_depth(self, prepare):
        """Call what it prepares ever deeper; whether there was room."""
        def at(depth, function):
            if depth:
                return at(depth - 1, function)
            try:
                function()
            except RecursionError:
                return False
            return True

        depth = 0
        while True:
            function = prepare()    # out here, where there is room
            try:
                taken = at(depth, function)
            except RecursionError:
                return      # no room for at() itself
            yield taken
            depth += 1 if depth > sys.getrecursionlimit() - 200 else 50

    def test_out_of_stack_it_is_counted_and_the_loop_is_woken(self):
        driver, client = self.serve(), self.connect()
        emitted = refused = 0
        for taken in self.at_every_depth(lambda: functools.partial(
                driver.notify, {}, numbered(emitted), 'INFO', None)):
            emitted, refused = emitted + taken, refused + (not taken)
            wait_until(lambda: driver._hub.asleep)
        # There was no room for notify(), nor for who traces it.
        self.assertIn(refused, (1, 1 + bool(sys.gettrace())))
        self.notify(driver, {'n': emitted})
        wait_until(lambda: account(client.read()) == emitted + 1)
        self.assertTrue(lost(client.messages))

    def test_secrets_are_masked_where_configured(self):
        driver, client = self.serve(sock_mask_secrets=True), self.connect()
        self.notify(driver, {'password': 'hunter2'})
        self.assertEqual({'password': '***'}, client.wait(1)[0]['payload'])

    def make_notifier(self, serializer=None, topics=None, **options):
        """A real one, whose driver needs not be installed."""
        def load(namespace, names, invoke_args, invoke_kwds, **kwargs):
            return extension.ExtensionManager.make_test_instance([
                extension.Extension(name, None, unix_notifier.UnixDriver,
                                    unix_notifier.UnixDriver(
                                        *invoke_args, **invoke_kwds))
                for name in names])

        self.useFixture(fixtures.MonkeyPatch(
            'oslo_messaging.notify.notifier.named.NamedExtensionManager',
            load))
        conf = self.make_conf(driver='unix', **options)
        notifier = oslo_messaging.Notifier(
            oslo_messaging.get_notification_transport(conf, 'fake:'),
            publisher_id='service.host', serializer=serializer, topics=topics)
        self.await_service()
        return notifier

    def test_every_priority_of_a_real_notifier_arrives(self):
        notifier = self.make_notifier()
        client = self.connect()
        priorities = ['audit', 'debug', 'info', 'warn', 'error', 'critical',
                      'sample']
        for number, name in enumerate(priorities):
            getattr(notifier, name)({'secret': 'token'}, 'it.happened',
                                    {'n': number})
        messages = client.wait(len(priorities))
        self.assertEqual(len(priorities), account(messages))
        self.assertEqual(list(map(str.upper, priorities)),
                         [each['priority'] for each in messages])
        for each in messages:
            self.assertEqual(KEYS, list(each))
            self.assertEqual(('service.host', 'it.happened'),
                             (each['publisher_id'], each['event_type']))
        self.assertLogged('token', 0)

    def test_topics_are_sent_where_they_are_not_the_default(self):
        """Of several notifiers, which share a hub; nova has such two."""
        topics = (None, ['notifications'], ('notifications',), ['versioned'],
                  ['notifications', 'vitrage'], [])
        notifiers = [self.make_notifier(topics=each) for each in topics]
        client = self.connect()
        for _ in range(2):
            for each in notifiers:
                each.info({}, 'it.happened', {})
        found = client.wait(12)
        self.assertEqual(2 * [
            None, None, None, ['versioned'], ['notifications', 'vitrage'], []],
            [each.get('topics') for each in found])
        self.assertEqual([KEYS, KEYS, KEYS, KEYS + ['topics']],
                         list(map(list, found[:4])))
        self.assertEqual(1, len(self.hubs()))

    class Serializer(oslo_messaging.NoOpSerializer):
        def serialize_context(self, ctxt):
            return ctxt if type(ctxt) is dict else dict(
                ctxt.to_dict(), service_catalog=[{'type': 'the token'}])

    ENVIRONMENT = {
        'HTTP_X_AUTH_TOKEN': 'the token', 'HTTP_X_SERVICE_TOKEN': 'token',
        'HTTP_X_IDENTITY_STATUS': 'Confirmed', 'HTTP_X_USER_ID': 'u',
        'HTTP_X_USER_NAME': 'U', 'HTTP_X_PROJECT_ID': 'p',
        'HTTP_X_PROJECT_NAME': 'P', 'HTTP_X_ROLES': 'member,reader',
        'HTTP_X_SERVICE_CATALOG': '[{"token": 1}]',
        'keystone.token_info': {'token': {}}}

    def test_context_is_sent_where_configured(self):
        """As it comes out of a real notifier, and of a service's serializer.

        keystonemiddleware authenticates by what it puts into the environment,
        and audits with the dict of an administrator's context.
        """
        authenticated = context.RequestContext.from_environ(
            self.ENVIRONMENT, overwrite=False)
        audited = context.get_admin_context().to_dict()
        for serializer in None, self.Serializer():
            notifier = self.make_notifier(serializer, sock_send_context=True)
            client = self.connect()
            for each in full_context(), authenticated, audited, {}, None:
                notifier.info(each, 'it.happened', {})
            messages = client.wait(5)
            full, authentic, *empty = [each['context'] for each in messages]
            expected = ContextTest.EXPECTED if serializer is None else {
                key: ContextTest.EXPECTED[key] for key in full}
            self.assertEqual(expected, full)
            self.assertEqual(
                ('u', 'p', ['member', 'reader'], authenticated.request_id),
                tuple(authentic[key] for key in (
                    'user', 'project_id', 'roles', 'request_id')))
            self.assertEqual([{}] * 3, empty)
            self.assertEqual(KEYS + ['context'], list(messages[0]))
            self.assertNotIn('token', str(messages))
            self.assertIn('request_id', full)

    def test_child_of_any_fork_serves_at_once(self):
        with fixtures.MonkeyPatch('threading.Thread.start', none_left):
            unix_notifier.UnixDriver(self.make_conf())

        def child():
            unix_notifier.UnixDriver(self.make_conf())
            self.await_service()
            self.connect()
            unix_notifier._at_exit()

        # As by the parent's loop, which is about to log.
        with held_elsewhere(unix_notifier._no_fork()):
            for fork in os.fork, ctypes.PyDLL(None).fork:
                self.assertEqual('', in_child(child, fork))

    def test_exit_closes_every_hub_whatever_happens(self):
        bad, good = mock.Mock(), mock.Mock()
        bad.close.side_effect = ZeroDivisionError
        unix_notifier._hubs[os.getpid()] = {'a': bad, 'b': good}
        unix_notifier._at_exit()
        good.close.assert_called_once_with()
        unix_notifier._hubs.clear()


class ReleaseNoteTest(TestCase):

    SECTIONS = {'prelude', 'features', 'issues', 'upgrade', 'deprecations',
                'critical', 'security', 'fixes', 'other'}

    def test_notes_are_what_reno_takes(self):
        names = glob.glob(os.path.join(HERE, 'releasenotes', 'notes', '*'))
        if not names:
            self.skipTest('there are no release notes here')
        for name in names:
            self.assertRegex(os.path.basename(name),
                             r'^[a-z0-9-]+-[0-9a-f]{16}\.yaml$')
            with open(name) as file:
                note = yaml.safe_load(file)
            self.assertLessEqual(set(note), self.SECTIONS)
            for section, entries in note.items():
                entries = [entries] if section == 'prelude' else entries
                self.assertIsInstance(entries, list)
                for entry in entries:
                    self.assertIsInstance(entry, str)
                    self.assertTrue(entry.strip())


# ---------------------------------------------------------------------------
# RELAY: all processes of a user on one path
# ---------------------------------------------------------------------------

class SteppedRelayHub(SteppedHub):
    """A hub of a process that shares its path, in the words of the tests."""

    roles = unix_notifier._Follower, unix_notifier._Relay
    half_sent = inside('loop.role._uplink.offset')   # bytes of a line
    follows = property(
        lambda self: not self.leads and self.loop.role._uplink.greeted
        and not self.loop.role._inherits())
    leads = property(lambda self: self.served)
    passed = inside('loop.role._sight.listener.sock')
    presence = inside('loop.role._sight._presence')
    uplink = inside('loop.role._uplink')
    looks_at = property(lambda self: tuple(each.fileno() for each in (
        self.passed, self.presence, self.uplink.sock)))
    relay_watched = property(
        lambda self: self.loop.path.bound['.relay'].sock
        in self.loop.files._selector.get_map())
    before_disconnect = functools.partialmethod(
        SteppedHub._hook, 'loop.role._uplink.disconnect')
    before_hello_is_parsed = functools.partialmethod(
        SteppedHub._hook, 'loop.files.own')

    def die(self):
        """As a process that is killed: its descriptors close, no more."""
        self.loop.closing = True
        if self.leads:
            for source in self.loop.role._others.sources:
                source.sock.close()
        self.loop.files.close()

    def uplink_ends(self):
        self.loop.role._uplink.ended = 'a test'
        self.turn()

    def sources(self):
        """The followers, as the leader sees them."""
        return list(self.loop.role._others.sources)


class RelayCase(HubCase):

    """Gives each test a leader and a follower, both in this process."""

    def make_pair(self, **options):
        """The two; with nobody connected, and both know that."""
        leader = self.make_newcomer(**options)
        self.step(leader)
        follower = self.make_follower(leader, **options)
        self.step(leader, follower)
        self.assertFalse(leader.gate_open or follower.gate_open)
        return leader, follower

    def make_three(self, **options):
        """The two, and a client that both know of."""
        leader, follower = self.make_pair(**options)
        client = self.connect(leader)
        self.step(follower)
        return leader, follower, client

    def make_newcomer(self, stepped=True, **options):
        hub = SteppedRelayHub(self.make_settings(**options), stepped)
        self.addCleanup(hub.finish if stepped else hub.close)
        return hub

    def make_follower(self, leader, *others, **options):
        hub = self.make_newcomer(**options)
        wait_until(lambda: self.step(hub, leader, *others) or hub.follows)
        return hub

    def call_relay(self):
        """A process that has connected there, and has said nothing."""
        sock = socket.socket(socket.AF_UNIX)
        self.addCleanup(sock.close)
        sock.connect(self.path + '.relay')
        return sock

    def step(self, *hubs):
        for hub in hubs:
            hub.turn()

    def settle(self, *hubs):
        """Let them look after the path until one leads and the rest follow."""
        def settled():
            for hub in hubs:
                hub.look_again()
            return all(hub.leads or hub.follows for hub in hubs)

        wait_until(settled)
        leader, = (hub for hub in hubs if hub.leads)
        return leader

    def assertLeads(self, hub, *others):
        """It comes to that, and serves who comes."""
        self.assertIs(hub, self.settle(hub, *others))
        self.assertServed(hub, self.connect(hub))

    def assertKeepsNothing(self, hub, lead):
        """Of what it emits, once it leads."""
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        lead()
        self.step(hub)
        late = self.connect(hub)
        for number in range(100):
            self.emit(hub, range(number, number + 1))
            self.step(hub)
        self.assertEqual(100, len(late.read()))
        self.assertGreater(50, sum(isinstance(each, unix_notifier._Chunk)
                                   for each in gc.get_objects()))


class RelayForkTest(DriverCase):

    """Relay: a parent that leads, and a child that follows."""

    def test_fork_amid_a_hand_over_leaves_the_turn_to_parent_and_child(self):
        driver, client = self.serve(), self.connect()
        self.notify(driver)
        client.wait(1)
        wait_until(lambda: driver._hub.asleep and driver._hub.ready)
        held, go = threading.Event(), threading.Event()
        driver._hub.on_hand_over(lambda: held.set() or go.wait(WAIT))
        reader, writer = os.pipe()

        def child():
            self.notify(driver, {'n': 2})
            os.write(writer, b'x')      # it did not wait for the parent's
            unix_notifier._at_exit()

        texts = []
        amid = threading.Thread(target=self.notify, args=(driver, {'n': 1}))
        amid.start()
        held.wait(WAIT)
        forker = threading.Thread(target=lambda: texts.append(in_child(child)))
        forker.start()
        self.assertEqual(b'x', os.read(reader, 1))
        go.set()
        for each in amid, forker:
            each.join(WAIT)
        self.assertEqual([''], texts)
        os.close(reader)
        os.close(writer)
        self.assertEqual([0, 1, 2], sorted(
            each['payload']['n'] for each in client.wait(3)))


class RelayStartTest(RelayCase):

    """Relay: who gets what from when on, as a follower sees it."""

    def test_who_may_not_lead_follows(self):
        leader = self.make_newcomer()
        self.step(leader)
        for number in (errno.EPERM, errno.EACCES, errno.EROFS):
            with mock.patch.object(unix_notifier._Lock, 'acquire',
                                   autospec=True,
                                   side_effect=OSError(number, 'no')):
                self.make_follower(leader)

    def test_who_waits_in_the_leaders_backlog_is_seen(self):
        """While nobody does, nothing is even serialized."""
        leader, follower = self.make_pair()
        with mock.patch.object(unix_notifier, '_encode', none_left):
            self.emit(follower, range(3))
        self.assertQueued(follower, 0)
        client = self.connect()     # not accepted yet
        self.emit(follower, range(3))
        self.assertQueued(follower, 3)
        self.step(follower)
        follower.hand_over(True)
        self.emit(follower, range(3, 20))
        self.assertQueued(follower, 0)
        follower.die()      # all is with the leader
        self.pump(leader, client, 20)

    def test_presence_is_up_before_the_first_is_accepted(self):
        # Once accepted it is no longer in the kernel's queue: the presence
        # is all that a follower can see of it.
        leader, follower = self.make_pair()
        found = []
        self.script(leader, lambda: (found.append(follower.anyone_seen),
                                     self.emit(follower, range(1))))
        client = self.connect()
        self.step(leader, follower, leader)
        self.assertEqual([True], found)
        self.assertEqual(1, account(client.read()))

    def test_presence_that_rises_after_the_look_is_no_miss(self):
        """The follower looks, finds nothing; only then somebody comes."""
        leader, follower = self.make_pair()
        clients = []

        def somebody_comes():
            clients.append(self.connect())
            self.step(leader)           # accepted, the presence is up

        follower.on_look(somebody_comes)
        # It began before connect() did, so it may be dropped; the next not.
        self.emit(follower, [7])
        self.emit(follower, range(1))
        self.step(follower, leader)
        self.assertEqual(1, account(clients[0].read()))

    def test_presence_is_down_once_the_last_has_gone(self):
        leader, follower = self.make_pair()
        follower.hand_over(True)
        client = self.connect(leader)
        self.assertTrue(follower.anyone_seen)
        self.emit(follower, range(1))
        client.sock.close()
        self.step(leader)
        with mock.patch.object(unix_notifier._libc, 'send', none_left):
            self.emit(follower, range(1))
        self.assertFalse(follower.anyone_seen)
        self.step(follower)
        self.assertFalse(follower.gate_open)

    def test_hello_that_waits_is_a_reason_to_go_on(self):
        """The leader has a new listener, which the follower cannot see."""
        leader, follower = self.make_pair()
        os.unlink(self.path)
        leader.look_again()
        client = self.connect()
        self.emit(follower, range(1))
        self.step(follower, leader)
        self.assertEqual(1, account(client.read()))

    def test_child_without_a_hook_leaves_the_number_of_an_event(self):
        """Which no identity tells from another file."""
        _, follower = self.make_pair()
        number = follower.presence.fileno()

        def child():
            os.dup2(1, number)
            follower.abandon(certain=False)
            os.fstat(number)

        self.assertEqual('', in_child(child, ctypes.PyDLL(None).fork))

    def test_line_as_a_start_has_failed_leaves_the_flag_up(self):
        self.addCleanup(listen(self.path).close)    # somebody may be there
        hub = self.make_newcomer(stepped=False)
        starting = hub.starting
        hub.starting = types.SimpleNamespace(
            acquire=starting.acquire,
            release=lambda: self.emit(hub, range(1)) or starting.release())
        with fixtures.MonkeyPatch('threading.Thread.start', none_left):
            self.emit(hub, range(1))
        hub.starting = starting
        wait_until(lambda: self.emit(hub, range(1)) or hub.thread)

    def test_where_a_loop_would_starve_it_never_leads(self):
        self.patch('_starves', lambda: True)
        hub = self.make_newcomer(stepped=False)
        self.emit(hub, range(3))
        self.assertFalse(hub.served or os.path.exists(self.path))

    def test_where_a_loop_would_starve_notify_does_its_work(self):
        leader = self.make_newcomer()
        self.step(leader)
        client = self.connect(leader)
        self.patch('_starves', lambda: True)
        hub = self.make_newcomer(stepped=False)
        for number in range(10):
            self.emit(hub, range(number, number + 1))
            self.assertIsNone(hub.thread)
            self.step(leader)
            # The first has to wait for the leader's answer.
            self.assertEqual(number and number + 1, account(client.read()))
        self.emit(hub, range(10, 11), size=2 ** 20)     # the kernel takes it
        self.step(leader)                               # by and by
        self.emit(hub, range(11, 12))   # not amid that
        wait_until(lambda: hub.wake()
                   or self.step(leader) or account(client.read()) == 12)
        # notify() never logs: other threads do, one for each turn.
        wait_until(lambda: 'relayed to' in self.log.output
                   and 'only follows' in self.log.output)
        for each in self.log.output.splitlines():
            self.assertEqual('only follows' in each or 'relayed' in each,
                             'MainThread' not in each, each)
        self.assertLogged('only follows')

    def test_leader_that_has_gone_is_handed_nothing(self):
        leader, follower = self.make_pair()
        follower.hand_over(True)
        client = self.connect(leader)
        leader.finish()
        self.emit(follower, range(2))   # which does not know yet
        self.assertQueued(follower, 2)
        self.pump(follower, self.connect(), 2)
        self.assertEqual([], client.read())

    def test_listener_presence_and_uplink_are_looked_at_in_this_order(self):
        # Presence first would miss who is accepted between the two.
        made, poll = [], unix_notifier._poll
        self.patch('_poll', lambda *filenos: (
            made.append(filenos) or poll(*filenos)))
        _, follower = self.make_pair()
        self.assertEqual(follower.looks_at, made[-1])

    def test_gate_is_open_while_a_hello_is_heard(self):
        leader, follower = self.make_pair()
        os.unlink(self.path)
        leader.look_again()
        # As it parses what it has taken from the uplink.
        follower.before_hello_is_parsed(self.spy(follower))
        self.step(follower)

    def test_gate_is_open_once_the_leader_has_gone(self):
        leader, follower = self.make_pair()
        number, other = follower.looks_at[2], os.eventfd(0)
        self.addCleanup(os.close, other)
        self.addCleanup(os.close, number)
        leader.finish()
        # A file with nothing to read gets the number of the uplink.
        follower.before_disconnect(self.spy(
            follower, lambda: os.dup2(other, number)))
        follower.uplink_ends()

    def test_connect_before_notify_is_the_start_whatever_runs_between(self):
        """Both loops in threads, which are switched as often as possible."""
        leader = self.make_newcomer(stepped=False)
        leader.start()
        # It does not sleep before it knows that nobody waits.
        wait_until(lambda: leader.served and not leader.gate_open)
        follower = self.make_newcomer(stepped=False)
        follower.start()
        wait_until(lambda: follower.follows)
        self.switch_threads_often()
        for number in range(500):
            sys.setswitchinterval((1e-6, 1e-5, 1e-4, 5e-3)[number % 4])
            hub = (leader, follower)[number // 2 % 2]
            client = self.connect()
            self.emit(hub, range(1))
            self.assertEqual(1, account(client.wait(1)))
            client.sock.close()


class RelayLoadTest(RelayCase):

    """Relay: what a leader does for those that read."""

    def fill(self, leader, follower, rounds):
        """Have the follower send more than a turn of the leader gives on."""
        for number in range(rounds):
            follower.emit(numbered(number, 100000))
            self.step(follower, leader)

    def test_who_reads_fast_loses_nothing(self):
        leader, follower, client = self.make_three(
            sock_buffer_size=4 * 2 ** 20)
        # As the reader would, where it has a CPU.
        with fixtures.MonkeyPatch('time.sleep', lambda _: client.read()):
            self.fill(leader, follower, 100)
        self.pump(leader, client, 100)
        self.assertEqual([], lost(client.messages))

    def test_green_thread_that_forks_meanwhile_ends_the_wait(self):
        leader, follower, _ = self.make_three(sock_buffer_size=2 ** 20)
        pid = os.getpid()

        def child():
            # The hook comes while the loop sleeps; in a pid namespace of its
            # own the child may have the same number.
            with fixtures.MonkeyPatch('os.getpid', lambda: pid), (
                    fixtures.MonkeyPatch(
                        'time.sleep',
                        lambda _: leader.abandon(certain=True))):
                self.assertRaises(RuntimeError, self.fill, leader, follower,
                                  60)

        self.assertEqual('', in_child(child))

    def test_who_does_not_read_is_waited_for_once(self):
        leader, follower, client = self.make_three(sock_buffer_size=2 ** 20)
        naps = []
        with fixtures.MonkeyPatch('time.sleep', naps.append):
            self.fill(leader, follower, 60)
        self.assertEqual(unix_notifier._PATIENCE,
                         naps.count(unix_notifier._GIVE_WAY))
        self.pump(leader, client, 60)
        self.assertTrue(lost(client.messages))


class RelayHeirTest(RelayCase):

    """Relay: a leader that leaves hands on what it has."""

    # Seconds: a busy machine is not what is tried.
    answer_time = hand_on_time = WAIT
    exit_time = 2 * WAIT    # a fifth of it is left for what is not handed on

    def leave(self, leader, *others, each_time=lambda: None):
        """Have it leave; the others take a turn whenever it waits for one.

        :param each_time: called after that
        :returns: how often it waited
        """
        naps, sleep = [], time.sleep

        def nap(seconds):
            if seconds != unix_notifier._GIVE_WAY:
                sleep(seconds)      # the loop rests
                return
            naps.append(seconds)
            self.step(*others)
            each_time()

        with fixtures.MonkeyPatch('time.sleep', nap), mock.patch.multiple(
                unix_notifier, _ANSWER_TIME=self.answer_time,
                _EXIT_TIME=self.exit_time):
            leader.finish(self.hand_on_time + self.exit_time / 5)
        return len(naps)

    def clog(self, leader):
        """A client that is owed most of what the leader emitted."""
        client = self.connect(leader)
        self.emit(leader, range(3), size=2 ** 20)
        leader.turn()
        return client

    def assertAccount(self, hub, total, *clients):
        for each in clients:
            self.pump(hub, each, total)
            self.assertFalse(each.ended)

    def owing(self):
        """A leader, the heir, another, and three clients that are owed some.

        Of each publisher: on its way, queued, and owed in part.
        """
        leader, heir = self.make_pair()
        slow = self.clog(leader)
        half, quick = self.connect(), self.connect()
        half.sock.shutdown(socket.SHUT_WR)
        other = self.make_follower(leader, heir)
        leader.turn()   # has heard of it
        self.emit(heir, range(3, 5), size=2 ** 18)
        self.step(heir)
        self.emit(heir, range(5, 7))
        self.emit(leader, range(50, 52))
        # So much that three lines are sent, and the fourth in part.
        self.emit(other, range(60, 64), size=60000)
        other.turn()
        return leader, heir, other, slow, half, quick

    def bound(self):
        return [os.stat(self.path + each).st_mtime_ns
                for each in ('', '.relay')]

    def test_subscribers_notice_nothing(self):
        leader, heir, other, *clients = self.owing()
        bound = self.bound()
        self.leave(leader, other)       # the newest, so it is the heir
        self.assertLogged('subscriber connected', 3)
        other.turn()
        self.assertEqual(bound, self.bound())
        self.assertLogged('handed on to pid %d, 3 subscribers' % os.getpid(),
                          2)
        self.assertNotIn('parted', self.log.output)
        wait_until(lambda: self.step(other, heir) or heir.follows)
        self.assertTrue(other.leads)
        self.emit(other, range(64, 66))
        late = self.connect(other)
        self.emit(heir, range(70, 72))

        def whole(client, first):
            """Each publisher's, in its order."""
            self.step(heir, other)
            numbers = [each['payload']['n'] for each in client.read()]
            return sorted(numbers, key=lambda each: bisect.bisect(
                (50, 60, 70), each)) == [
                    *range(first, 7), 50, 51, *range(60, 66), 70, 71]

        for client, first in zip(clients, (0, 3, 3)):
            wait_until(lambda: whole(client, first))
        wait_until(lambda: self.step(heir, other) or [
            each['payload']['n'] for each in late.read()][-2:] == [70, 71])
        self.assertFalse(any(each.ended for each in (*clients, late)))
        heir.finish()
        other.turn()
        other.finish()
        self.assertLogged(', 17 lines, 0 lost; the service stops')
        self.assertLogged(', 14 lines, 0 lost; the service stops', 2)

    def test_what_is_owed_stays_what_it_was(self):
        """A cursor anywhere, chunks of one's own, losses: all go on."""
        for seed in range(200):
            chance = random.Random(seed)
            backlog = unix_notifier._Backlog(chance.choice((3000, 10 ** 6)))
            streams, numbers = [], itertools.count()
            for _ in range(chance.randrange(1, 30)):
                if chance.random() < 0.3:
                    streams.append(unix_notifier._Subscriber(
                        FakeSocket(), backlog, 'pid 1', chance.randrange(9)))
                elif chance.random() < 0.2:
                    backlog.append(b'', 0, chance.randrange(1, 9), 'a test')
                else:
                    backlog.extend([line(next(numbers)) for _ in range(
                        chance.randrange(1, 9))])
                for each in streams:
                    each.half_closed = chance.random() < 0.5
                    each.discarded = chance.randrange(9)
                    each.lagging = chance.choice((None, each.lost))
                    each.sock.room = chance.choice((0, 0, 50, 500))
                    if each.pending():
                        each.flush()
                        each.trim(backlog)
            self.assertPassedOn(streams, backlog, chance.randrange(9))

    def assertPassedOn(self, streams, backlog, ahead):
        owed = b''.join(unix_notifier._owed(streams, backlog.tail, [1, 2, 3]))
        header, _, data = owed.partition(b'\n')
        _, chunks, told = json.loads(header)
        ours = unix_notifier._Backlog(backlog.limit)
        ours.append(b'x\n' * ahead, ahead)
        estate = unix_notifier._Estate(mock.Mock(), mock.Mock())
        estate._chunks, estate._streams, estate._data = chunks, told, data
        estate._socks = [FakeSocket() for _ in streams]
        with mock.patch.object(
                unix_notifier._Subscriber, 'lost_line', staticmethod(
                    lambda lost, reason: b'%d %s\n' % (
                        lost, reason.encode()))):
            passed = list(estate.subscribers(ours.tail, ours))
            for each in (*streams, *passed):
                each.before = each.received(), each.lost
                each.behind = backlog.behind(each.chunk) if (
                    each in streams) else ours.behind(each.chunk)
                each.sock.room, each.sock.data = 10 ** 9, bytearray()
                while each.pending():
                    each.flush()
        for one, two in zip(streams, passed):
            for name in ('before', 'behind', 'who', 'uid', 'half_closed',
                         'discarded', 'lost', 'lagging'):
                self.assertEqual(getattr(one, name), getattr(two, name), name)
            self.assertEqual(one.sock.data, two.sock.data)
            self.assertEqual(one.received(), two.received())

    def test_many_are_passed_a_few_at_a_time(self):
        """Nobody rests, as after visits: what a leader passes on is none."""
        leader, heir = self.make_pair(sock_max_subscribers=200)
        clients = [self.connect(leader) for _ in range(150)]
        self.step(heir, leader, heir)
        before = open_files()
        with mock.patch.object(unix_notifier._Visits, 'slow_down',
                               autospec=True) as rest:
            self.leave(leader, heir)
            heir.turn()
            self.assertServed(heir, *clients)
        rest.assert_not_called()
        self.assertLogged('handed on to pid %d, 150' % os.getpid(), 2)
        self.assertLessEqual(len(open_files()), len(before))

    def test_no_descriptor_is_left_by_those_who_lead_in_turn(self):
        leader, heir = self.make_pair()
        client = self.connect(leader)
        files = []
        for number in range(50):
            heir.emit(numbered(number))
            self.leave(leader, heir)
            leader, heir = heir, self.make_follower(heir)
            leader.turn()
            if number % 10 == 9:
                files.append(len(open_files()))
        self.assertAccount(leader, 50, client)
        self.assertEqual(1, len(set(files)), files)

    def test_heir_keeps_nothing_for_who_might_have_waited(self):
        leader, heir, _ = self.make_three()
        self.assertKeepsNothing(heir, lambda: self.leave(leader, heir))

    def test_events_that_tell_of_nothing_hold_nobody_up(self):
        """As there are under eventlet, after a fork."""
        leader, heir = self.make_pair()
        client = self.connect(leader)
        for hub in leader, heir:
            hub.on_select(lambda _, selector=hub.selector: [
                (key, selectors.EVENT_READ)
                for key in selector.get_map().values()])
        self.step(leader, heir)
        self.leave(leader, heir, heir)
        self.step(heir, heir)
        self.assertServed(heir, client)
        self.assertLogged('handed on', 2)

    def test_who_comes_meanwhile_misses_nothing(self):
        leader, heir, _ = self.make_three()
        late = []

        def come():
            late.append(self.connect())
            heir.emit(numbered(len(late) - 1))
            heir.turn()     # to the leader, while that listens

        naps = self.leave(leader, heir, each_time=come)
        self.assertGreater(naps, 2)
        self.step(heir)
        for number, each in enumerate(late):
            # What is on its way as it comes, it gets, too.
            first = each.read()[0]['payload']['n']
            self.assertLessEqual(first, number)
            self.assertEqual(naps, account(each.messages, first))

    def test_follower_that_is_greeted_at_once_finds_somebody(self):
        """Or it would drop what it has yet to send."""
        for most in in_turn(self, (16, 1)):     # followers are asked
            self.patch('_ASKED_MAX', most)
            leader, other, client = self.make_three()
            heir = self.make_follower(leader)
            self.step(leader, other)
            held = [each.sock.dup()     # as by a child
                    for each in leader.sources()]
            followed = []
            self.leave(leader, heir, other,
                       each_time=lambda: followed.append(other.follows))
            self.assertEqual([most == 1, True], followed[:2])
            self.step(other, other)     # it waits for a hello
            self.assertFalse(other.follows)
            self.emit(other, range(3))
            self.step(other)
            end = heir.on_work(lambda: self.step(other))
            self.assertAccount(heir, 3, client)
            end()
            for each in other, heir:
                each.finish()
            for each in held:
                each.close()

    def test_what_other_threads_emit_meanwhile_is_told_of(self):
        leader, heir = self.make_pair(sock_buffer_size=2 ** 16)
        client = self.connect(leader)
        self.emit(leader, range(2))
        numbers = itertools.count(2)
        # More than there is room for, once none is sent any more.
        naps = self.leave(leader, heir, each_time=lambda: self.emit(
            leader, itertools.islice(numbers, 9), size=10 ** 4))
        total = 2 + 9 * naps
        self.emit(heir, range(total, total + 2))
        self.assertAccount(heir, total + 2, client)
        self.assertIn('leader left', {
            each['payload']['reason'] for each in client.messages
            if each['event_type'] == 'notifications.lost'})

    def fail_at(self, turns, fail):
        """Have the heir fail after so many turns, with a third one there.

        Both have to be waited for, or given up, in the time there really is.

        :returns: whether it was that far; the third one, and a client
        """
        self.answer_time, self.hand_on_time = 0.2, 0.4
        self.dir = self.useFixture(fixtures.TempDir()).path
        self.path = os.path.join(self.dir, 's')
        leader, other = self.make_pair()
        client = self.clog(leader)
        heir = self.make_follower(leader)
        self.step(leader, other)
        self.emit(heir, range(3, 5))
        self.step(heir)
        left = [turns]

        def turn():
            left[0] -= 1
            if left[0] >= 0:
                SteppedHub.turn(heir)
            elif left[0] == -1:
                # The third one has to go on, too, and waits for a hello. It
                # comes back as the relay goes, which the heir holds open.
                other.uplink_ends()
                other.turn()
                leader.on_close_listener(lambda: other.look_again(2))
                fail(leader, heir)

        leader.on_turn(before=client.read)
        with mock.patch.object(heir, 'turn', turn):
            self.leave(leader, heir)
        return left[0] < 0, other, client

    def assertGoesOn(self, client, *others):
        """Who is left serves, and the stream is whole, up to its end."""
        leader = self.settle(*others)
        self.assertServed(leader, self.connect(leader))
        while not client.ended:
            client.receive()
        account(client.messages)

    def test_what_is_raised_after_the_last_word_changes_nothing(self):
        """By a signal's handler, say: all is the heir's by then."""
        leader, heir, client = self.make_three()
        close_all = unix_notifier._close_all

        def close(files):
            close_all(files)
            if leader.gate is unix_notifier._no:
                raise TimeoutError

        self.patch('_close_all', close)
        self.assertRaises(TimeoutError, self.leave, leader, heir)
        self.patch('_close_all', close_all)
        heir.turn()
        self.assertServed(heir, client)
        self.assertServed(heir, self.connect(heir))

    def test_what_was_taken_in_is_sent_though_nobody_can_be_let_in(self):
        leader, heir, client = self.make_three()
        self.emit(heir, range(3))
        heir.turn()

        def refuse():
            refusing()
            raise OSError(errno.EMFILE, 'a test')

        refusing = leader.on_accept(before=refuse)
        self.leave(leader, heir)
        self.assertEqual(3, account(client.read()))
        self.assertTrue(client.ended)

    def test_rest_of_a_line_goes_with_it(self):
        leader, heir, client = self.make_three()
        leader.subscribers[0].sock.send(line(0)[:9])
        leader.rest = line(0), [9]
        self.leave(leader, heir)
        self.emit(heir, range(1, 3))
        self.assertAccount(heir, 3, client)

    def test_follower_that_has_just_come_may_be_the_heir(self):
        leader = self.make_newcomer()
        leader.turn()
        client = self.connect(leader)
        heir = self.make_newcomer()
        heir.turn()     # it has connected, and was not accepted
        mute = self.call_relay()
        leader.lock.write(vacated=True)     # or the pid would be the same
        self.leave(leader, heir)
        heir.turn()
        self.assertServed(heir, client)
        self.assertEqual(os.getpid(), heir.lock.read()['pid'])
        self.assertNotIn(b'heir', b''.join(iter(lambda: mute.recv(99), b'')))

    def test_what_comes_too_late_may_come_while_it_is_counted(self):
        """From threads that had found the gate open."""
        leader, heir, client = self.make_three()
        late, islice = itertools.count(), itertools.islice

        def emit():
            if leader.gate is unix_notifier._no:
                leader.gate = unix_notifier._yes
                leader.emit(numbered(next(late)))

        def emit_amid(*arguments):
            sliced = islice(*arguments)
            leader.gate = unix_notifier._no
            emit()
            return sliced

        leader.on_work(before=emit)
        with mock.patch.object(itertools, 'islice', emit_amid):
            self.leave(leader, heir)
        self.assertEqual(2, next(late))
        heir.turn()
        self.assertEqual([1], lost(client.read()))
        self.assertServed(heir, client)

    class Stopped(BaseException):
        """A process that goes no further, as far as its code can tell."""

    def test_leader_that_stops_amid_it_is_given_up(self):
        leader, heir, _ = self.make_three()
        self.exit_time = 0.1
        self.assertRaises(self.Stopped, self.leave, leader, heir,
                          each_time=mock.Mock(side_effect=self.Stopped))
        self.assertFalse(heir.follows)
        wait_until(lambda: heir.turn() or heir.follows)

    def test_heir_that_fails_before_it_has_all_leaves_it_to_others(self):
        """Or is passed over, if it goes on but does nothing."""
        ways = {'is killed': lambda _, heir: heir.die(),
                'stops': lambda *_: None,
                'leaves': lambda _, heir: heir.finish()}
        # It is asked, has the lock, what is owed, the streams; and all.
        for turns, way in in_turn(self, itertools.product(range(5), ways)):
            failed, other, client = self.fail_at(turns, ways[way])
            self.assertEqual(turns < 4, failed)
            if failed:
                self.assertGoesOn(client, other)
                self.assertTrue(way == 'is killed'
                                or account(client.messages) == 5)

    def test_leader_that_is_killed_amid_it_takes_the_streams_along(self):
        def kill(leader, heir):
            heirs.append(heir)
            leader.die()
            raise self.Stopped

        def leave(leader, heir):
            # Then it is killed before the last word.
            leader.count_left = lambda: kill(leader, heir)
            self.assertRaises(self.Stopped, RelayHeirTest.leave, self, leader,
                              heir)

        heirs = []
        for turns in in_turn(self, range(5)):
            with mock.patch.object(self, 'leave', leave):
                _, other, client = self.fail_at(turns, kill)
            # Another leads, for the heir cannot.
            heir, newcomer = heirs.pop(), self.make_newcomer()
            with mock.patch('os.open', autospec=True,
                            side_effect=OSError(errno.EMFILE, 'full')):
                heir.look_again(3)
            newcomer.turn()
            self.assertGoesOn(client, heir, other, newcomer)

    def test_who_may_not_or_cannot_is_no_heir(self):
        for _, change in in_turn(self, enumerate((
                lambda leader, heir: setattr(leader.sources()[0], 'uid', -1),
                lambda leader, heir: setattr(heir.loop, 'closing', True),
                lambda leader, heir: setattr(heir.loop, 'starves', True),
                lambda leader, heir: setattr(heir.uplink, 'uid', -1),
                lambda leader, heir: leader.sources()[0].sock.shutdown(
                    socket.SHUT_WR),
                lambda leader, heir: os.unlink(self.path),
                # Once it has been asked.
                lambda leader, heir: heir.on_turn(after=lambda: touch(
                    self.path + '.new') or os.rename(
                        self.path + '.new', self.path + '.lock')),
                lambda leader, heir: self.useFixture(
                    fixtures.MockPatchObject(
                        unix_notifier._libc, 'memfd_create',
                        side_effect=AttributeError))))):
            leader, heir, client = self.make_three()
            self.emit(leader, range(3))
            self.emit(heir, range(3, 103), size=1000)   # for several reads
            self.step(heir)
            change(leader, heir)
            began = time.monotonic()
            self.leave(leader, heir)
            self.assertLess(time.monotonic() - began, 1)
            self.assertEqual(103, account(client.read()))
            self.assertTrue(client.ended)
            heir.die()
        self.assertLogged('handed on', 0)

    def test_who_may_not_write_to_the_directory_is_no_heir(self):
        leader, heir, client = self.make_three()
        with mock.patch('os.access', autospec=True, return_value=False):
            self.leave(leader, heir)
        self.assertEqual([], client.read())
        self.assertTrue(client.ended)
        self.assertLogged('handed on', 0)

    def test_heir_that_leaves_is_one_all_the_same_if_it_has_all(self):
        leader, heir, client = self.make_three()
        self.emit(leader, range(3))
        self.leave(leader, heir)    # whose last word it has yet to hear
        # Sent whole, for what the last leader had of it went with that.
        heir.rest = line(3), [9]
        self.emit(heir, range(4, 6))
        heir.finish()
        self.assertEqual(6, account(client.read()))
        self.assertTrue(client.ended)
        self.assertLogged('handed on', 2)

    def test_heir_that_leaves_hands_on_what_it_has_yet_to_take(self):
        leader, other, client = self.make_three()
        heir = self.make_follower(leader)
        self.step(leader, other)
        self.emit(leader, range(3))
        self.leave(leader, heir)
        self.emit(heir, range(3, 5))
        self.step(other, other)     # it waits for a hello
        self.leave(heir, other)
        self.assertAccount(other, 5, client)

    def test_heir_without_descriptors_to_spare_is_passed_over(self):
        for spare in in_turn(self, range(4)):
            leader, heir, client = self.make_three()

            def turn():
                with no_descriptors(spare):
                    SteppedHub.turn(heir)

            with mock.patch.object(heir, 'turn', turn):
                self.leave(leader, heir)
            self.assertLeads(heir)
            self.assertNotEqual(bool(client.read()), client.ended)
            heir.finish()

    def test_nonsense_from_a_leader_is_no_estate(self):
        """Nor is a last word before all has come."""
        def says(data):
            return lambda bequest, *_: bequest._heir.send(data)

        def stops_after(count, tell=unix_notifier._Bequest._tell):
            told = iter(range(count))
            return lambda *args: next(told, None) is None or tell(*args)

        for way, what in in_turn(self, (
                (says, b'lost x'), (says, b'2'), (says, b'0'),
                (says, b'lost 1' * 9),
                # Of lock and relay; what is owed; streams.
                (stops_after, 0), (stops_after, 1), (stops_after, 2))):
            leader, heir, client = self.make_three()
            with mock.patch.object(
                    unix_notifier._Bequest, '_tell', way(what)):
                self.leave(leader, heir)
            self.assertEqual(([], True), (client.read(), client.ended))
            self.assertLeads(heir)
            heir.finish()
        self.assertLogged('handed on', 7)   # as the leader believes


class RelayPathTest(RelayCase):

    """Relay: who leads."""

    def leave(self, leader):
        """As at its end, amid whatever: it owes nobody anything."""
        leader.lock.write(vacated=True)
        leader.die()

    def test_who_has_taken_over_keeps_nothing_for_who_might_have_waited(self):
        leader, follower, _ = self.make_three()
        leader.die()
        self.emit(follower, range(1))       # is owed to who waits
        self.assertKeepsNothing(follower, lambda: self.settle(follower))

    def test_who_cannot_watch_the_other_tries_again(self):
        leader, follower = self.make_pair()
        other = self.make_newcomer()
        other.turn()
        error = OSError(errno.ENOSPC, 'too many are watched')
        for hub, connect in in_turn(self, (
                (leader, leader.turn), (follower, follower.uplink_ends))):
            with mock.patch.object(hub.selector, 'register', autospec=True,
                                   side_effect=error) as register:
                connect()
            register.assert_called()
            self.assertIs(leader, self.settle(leader, follower, other))

    def test_who_waits_at_a_listener_that_lost_the_path_sees_the_end(self):
        leader, follower = self.make_pair()
        other = follower.passed.dup()   # as another follower holds it
        self.addCleanup(other.close)
        client = self.connect()
        os.unlink(self.path)
        leader.die()
        self.assertLeads(follower)
        client.read()
        self.assertTrue(client.ended)

    def test_leader_without_a_relay_sends_all_as_it_leaves(self):
        os.mkdir(self.path + '.relay')
        hub = self.make_newcomer()
        self.step(hub)
        client = self.connect(hub)
        self.emit(hub, range(3))
        hub.finish()
        self.assertEqual(3, account(client.read()))

    def test_directory_may_have_several_names(self):
        leader, follower = self.make_pair()
        other_name = self.dir + '2'
        os.symlink(self.dir, other_name)
        self.addCleanup(os.unlink, other_name)
        leader.die()    # the follower, which is stopped, has the listener
        self.assertLeads(self.make_newcomer(
            sock_path=os.path.join(other_name, 's')))

    def remove_all(self):
        for name in os.listdir(self.dir):
            os.unlink(os.path.join(self.dir, name))

    def test_who_lost_everything_follows_its_successor(self):
        leader, follower, before = self.make_three()
        self.remove_all()
        successor = self.make_newcomer()
        successor.turn()
        after = self.connect(successor)
        # On its way up as the leader resigns: told here, and lost there.
        self.emit(follower, range(3))
        self.step(follower)
        leader.look_again()
        self.assertEqual(3, account(before.read()))
        self.assertTrue(before.ended)
        self.assertIs(successor, self.settle(successor, leader, follower))
        wait_until(lambda: self.step(leader, successor) or after.read())
        self.assertEqual(
            [{'lost': 3, 'reason': 'leader replaced'}],
            [each['payload'] for each in after.messages])
        self.emit(leader, range(3, 4))
        self.step(leader, successor)
        self.assertEqual(4, account(after.read()))

    def test_who_comes_as_a_leader_leaves_is_for_the_next(self):
        leader, follower, slow = self.make_three()
        self.emit(leader, range(1), size=2 ** 22)
        leader.turn()
        clients = []

        def come():     # once it has cut off, and waits for the slow one
            if leader.called_last:
                clients.append(self.connect())
                slow.receive(2 ** 23)
                follower.turn()     # it hears of the end last
                self.assertTrue(follower.uplink.greeted)

        leader.on_turn(before=come)
        leader.finish()
        self.assertIs(follower, self.settle(follower))
        self.step(follower)
        self.assertTrue(clients)
        self.assertServed(follower, *clients)

    def test_subscriber_that_ended_is_no_concern_of_the_next_role(self):
        leader, follower = self.make_pair()
        client = self.connect(leader)
        client.sock.shutdown(socket.SHUT_WR)    # only a send will tell
        self.step(leader, follower)
        client.sock.close()
        self.remove_all()
        other = self.make_newcomer()
        other.turn()
        self.emit(follower, range(1))   # which fails as the leader resigns
        self.step(follower)
        leader.look_again()
        self.assertFalse(leader.leads)
        self.assertIs(other, self.settle(leader, follower, other))

    def test_follower_goes_on_with_the_listener_of_a_leader_that_left(self):
        """Who waits there misses nothing, nor does who comes meanwhile."""
        leader, follower = self.make_pair()
        bound = os.stat(self.path).st_ino
        clients = [self.connect()]
        self.emit(follower, range(3))
        self.leave(leader)

        def come():     # once it leads, and before it has accepted anybody
            if follower.leads and len(clients) == 1:
                self.emit(follower, range(3, 4))
                clients.append(self.connect())

        follower.on_work(come)
        self.assertIs(follower, self.settle(follower))
        self.assertEqual(bound, os.stat(self.path).st_ino)
        self.emit(follower, range(4, 5))
        # It gets what is on its way, and so all that follows.
        for each in clients:
            self.pump(follower, each, 5)

    def test_successor_leads_at_once_even_of_who_has_just_greeted(self):
        leader, follower = self.make_pair()
        leader.die()
        self.step(follower)
        self.assertTrue(follower.served)

    def test_who_waits_at_a_dead_leader_sees_the_end_of_the_stream(self):
        for lock_too in in_turn(self, (False, True)):
            leader, follower = self.make_pair()
            bound = os.stat(self.path).st_ino
            clients = [self.connect() for _ in range(3)]
            self.emit(follower, range(3))
            self.step(follower)
            if lock_too:
                os.unlink(self.path + '.lock')
            leader.die()    # and with it what it was sent
            with mock.patch.object(unix_notifier, '_accept', autospec=True,
                                   side_effect=OSError(errno.EMFILE, 'full')):
                follower.look_again()
            self.assertFalse(follower.served)   # or the rest would go on
            self.assertLeads(follower)
            self.assertEqual([([], True)] * 3, [
                (each.read(), each.ended) for each in clients])
            self.assertEqual(bound, os.stat(self.path).st_ino)
            follower.finish()

    def test_half_sent_line_goes_whole_to_the_next(self):
        """In whichever way the leader ends."""
        for end in in_turn(self, (self.leave, SteppedRelayHub.finish)):
            leader, follower, before = self.make_three()
            self.emit(follower, range(1), size=2 ** 19)
            follower.drop()     # of which it has a record, in a leader's words
            self.step(follower, leader)
            self.assertLess(0, follower.half_sent)
            end(leader)
            after = self.connect()
            self.assertIs(follower, self.settle(follower))
            self.pump(follower, after, 2)
            self.assertEqual([], before.read())
            self.assertTrue(before.ended or end == self.leave)
            follower.finish()

    def test_path_goes_with_the_last_that_leaves(self):
        first, second = self.make_pair()
        first.finish()
        self.assertTrue(os.path.exists(self.path))  # the second goes on
        self.assertIs(second, self.settle(second))
        third = self.make_newcomer()
        self.settle(second, third)
        third.finish()
        second.finish()     # which has not read the end of the third's stream
        self.assertFalse(os.path.exists(self.path))

    def test_who_waits_at_a_listener_that_lost_the_path_is_let_go(self):
        leader, follower = self.make_pair()
        client = self.connect()
        os.unlink(self.path)
        leader.die()
        self.assertLeads(follower)
        self.assertEqual(([], True), (client.read(), client.ended))

    def test_who_waits_is_owed_all_though_nobody_can_lead_at_once(self):
        @contextlib.contextmanager
        def file_in_the_way(follower):
            touch(self.path + '.relay')
            yield
            os.unlink(self.path + '.relay')

        def full_disk(follower):
            return mock.patch.object(
                follower.lock, 'write', autospec=True,
                side_effect=OSError(errno.ENOSPC, 'full'))

        for trouble in in_turn(self, (file_in_the_way, full_disk)):
            leader, follower = self.make_pair()
            client = self.connect()
            self.emit(follower, range(3))
            os.unlink(self.path + '.relay')
            self.leave(leader)
            with trouble(follower):
                follower.look_again(9)
                self.assertFalse(follower.served)
            self.assertIs(follower, self.settle(follower))
            self.pump(follower, client, 3)
            follower.finish()

    def test_who_came_as_a_leader_left_is_owed_what_it_emitted_since(self):
        for emits, slow in in_turn(self, (
                (False, 0), (True, 0), (True, 2 ** 22))):
            leader, follower = self.make_pair()
            self.connect(leader)
            self.emit(leader, range(1), size=slow)  # others have yet to read
            leader.turn()
            late = []

            def last_turn():
                late.append(self.connect())     # it accepts no more
                if emits and len(late) == 1:
                    self.emit(leader, range(1))     # another thread does

            leader.on_turn(after=last_turn)
            leader.finish()
            self.assertIs(follower, self.settle(follower))
            self.step(follower)
            self.assertEqual([], late[0].read())
            self.assertEqual(emits, late[0].ended)
            follower.finish()

    @contextlib.contextmanager
    def away(self, path):
        """It has another name, for a moment."""
        os.rename(path, path + '.away')
        yield
        os.rename(path + '.away', path)

    def test_newcomer_owes_all_though_it_cannot_follow_at_once(self):
        """For a moment, or as long as it has no descriptors."""
        no_files = mock.patch('os.open', autospec=True,
                              side_effect=OSError(errno.EMFILE, 'full'))
        for trouble, tries in in_turn(self, (
                (self.away(self.dir), 1), (no_files, 9))):
            leader = self.make_newcomer()
            self.step(leader)
            client = self.connect(leader)
            newcomer = self.make_newcomer()
            with trouble:
                for number in range(5):     # each time it has just tried
                    newcomer.look_again(tries)
                    self.emit(newcomer, range(number, number + 1))
            self.assertIs(leader, self.settle(leader, newcomer))
            self.step(newcomer)
            self.pump(leader, client, 5)
            newcomer.finish()
            leader.finish()

    def test_who_can_neither_lead_nor_follow_keeps_nothing_until_it_may(self):
        for hinder, free in in_turn(self, (
                (os.rmdir, os.mkdir), (touch, os.unlink))):
            path = self.dir if hinder is os.rmdir else self.path
            hinder(path)
            newcomer = self.make_newcomer()
            self.emit(newcomer, [7])    # as somebody might be there
            newcomer.look_again(9)
            with mock.patch.object(unix_notifier, '_encode', autospec=True,
                                   side_effect=AssertionError):
                self.emit(newcomer, range(3))
            self.assertQueued(newcomer, 0)
            free(path)
            leader = self.make_newcomer()
            self.step(leader)
            client = self.connect()
            with self.away(self.path):
                self.emit(newcomer, range(1))   # before it has tried again
            self.assertIs(leader, self.settle(leader, newcomer))
            self.step(newcomer)
            self.pump(leader, client, 1)
            newcomer.finish()
            leader.finish()
            self.remove_all()

    def test_follower_has_the_leader_look_after_the_path(self):
        leader, follower = self.make_pair()
        os.unlink(self.path)
        follower.look_again()
        # Which wakes the leader, idle as it is.
        self.assertTrue(select.select([leader.selector], [], [], 0)[0])
        leader.overdue()
        self.step(follower, leader)
        self.assertTrue(os.path.exists(self.path))

    def test_newcomer_has_an_idle_leader_look_after_its_relay(self):
        leader, _ = self.make_pair()
        os.unlink(self.path + '.relay')
        newcomer = self.make_newcomer()
        newcomer.look_again(8)
        self.emit(newcomer, range(1))   # is owed, for somebody leads
        # It does not disturb one that is about to leave.
        selector = leader.selector.fileno()
        self.assertFalse(select.select([selector], [], [], 0)[0])
        newcomer.look_again()
        # Which wakes the leader, idle as it is.
        self.assertTrue(select.select([selector], [], [], 0)[0])
        newcomer.look_again()
        client = self.connect()
        leader.overdue()
        self.step(leader)
        self.assertTrue(os.path.exists(self.path + '.relay'))
        self.assertIs(leader, self.settle(leader, newcomer))
        self.step(newcomer)
        self.pump(leader, client, 1)

    def test_newcomer_keeps_all_until_a_leader_without_lock_has_noticed(self):
        leader, follower, client = self.make_three()
        for suffix in '.lock', '.relay':
            os.unlink(self.path + suffix)
        newcomer = self.make_newcomer()
        self.emit(newcomer, range(1))
        newcomer.look_again(3)
        self.assertIs(leader, self.settle(leader, follower, newcomer))
        self.step(newcomer, leader)
        self.assertEqual(1, account(client.read()))

    def test_what_a_follower_left_is_read_though_the_path_was_lost(self):
        """It is gone when the leader would tell it of a new listener."""
        leader, follower, client = self.make_three()
        self.emit(follower, range(100), size=1000)  # for more than one read
        self.step(follower)
        follower.finish()
        os.unlink(self.path)
        leader.look_again()
        self.pump(leader, client, 100)

    def test_without_descriptors_followers_wait_and_that_is_logged_once(self):
        leader, _ = self.make_pair()
        newcomer = self.call_relay()
        newcomer.setblocking(False)
        with no_descriptors():
            leader.look_again(5)
            # It is readable all the time.
            self.assertFalse(leader.relay_watched)
            self.assertRaises(BlockingIOError, newcomer.recv, 100)
        leader.look_again(5)
        self.assertTrue(newcomer.recv(100))
        self.assertLogged('Too many open files; trying again')
        self.assertLogged('all is well again')

    def test_relay_that_could_not_be_recorded_is_bound_anew(self):
        leader, follower = self.make_pair()
        os.unlink(self.path + '.relay')
        with mock.patch.object(leader.lock, 'write', autospec=True,
                               side_effect=OSError(errno.ENOSPC, 'full')):
            leader.look_again()
        leader.look_again()
        follower.uplink_ends()      # to have it connect again
        self.assertIs(leader, self.settle(leader, follower))

    @as_root
    def test_stranger_is_told_nothing(self):
        leader, _ = self.make_pair()
        os.chmod(self.path + '.relay', 0o666)
        for directory in (self.path, os.path.dirname(self.path)):
            os.chmod(os.path.dirname(directory), 0o755)
        with as_uid(NOBODY):
            stranger = self.call_relay()
        self.step(leader)
        self.assertEqual(b'', stranger.recv(100))
        self.assertLogged('uid %d: not trusted' % NOBODY)

    def test_nonsense_is_named_once_and_cut_off(self):
        leader, _ = self.make_pair()
        for text in in_turn(self, (
                b'GET / HTTP/1.1\n', b'unix-notifier relay 2\n-x y\n',
                b'unix-notifier relay 2\n-1\n', b'unix-notif', b'x' * 5000)):
            peer = self.call_relay()
            peer.send(text)
            self.step(leader, leader)
            self.assertTrue(peer.recv(1000).startswith(unix_notifier._HELLO))
            with contextlib.suppress(ConnectionResetError):
                self.assertEqual(b'', peer.recv(1000))
        self.assertLogged('relay refused: pid %d, uid %d: b\'GET / HTTP' % (
            os.getpid(), os.getuid()))
        self.assertLogged('relay refused')


class RelayWordsTest(RelayCase):

    """Relay: what the other side may say."""

    def pose_as_leader(self, backlog=8):
        """Have the lock, and the relay, which is returned."""
        lock = unix_notifier._Lock(self.path + '.lock')
        self.addCleanup(lock.close)
        lock.acquire()
        relay = listen(self.path + '.relay', backlog)
        self.addCleanup(relay.close)
        return relay

    def test_losses_that_stand_together_make_one_record(self):
        one = line(0)
        for block, expected in (
                (b'', []), (one, [(1, 0)]), (one * 3, [(3, 0)]),
                (b'-5 late\n', [(0, 5, 'late')]), (b'-0 look\n' * 9, []),
                (b'-1 a\n-0 z\n-3 b\n', [(0, 4, 'b')]),
                (one + b'-1 a\n-1 a\n' + one * 2 + b'-2 b\n',
                 [(1, 0), (0, 2, 'a'), (2, 0), (0, 2, 'b')]),
                (b'-1 x\n' * 50000, [(0, 50000, 'x')]),
                (b'-%s x\n' % (b'9' * 18) * 2, [(0, 10 ** 18 - 1, 'x')]),
                # Where there are too many places, at the first.
                ((b'{}\n-1 x\n') * 50000, [(0, 50000, 'x'), (50000, 0)])):
            chunks = list(unix_notifier._chunks(block))
            self.assertEqual(expected, [each[1:] for each in chunks])
            for data, lines, *_ in chunks:
                self.assertEqual(lines, data.count(b'\n'))

    def test_nonsense_costs_nothing_that_precedes_it(self):
        for nonsense in in_turn(self, (
                b'-\n', b'-1\n', b'-x y\n', b'--1 y\n', b'-1 \xff\n',
                b'-1 \x1b[1m\n', b'-1 %s\n' % (b'y' * 81),
                b'-%s y\n' % (b'9' * 19), b'-\xc2\xb2 y\n',
                b'-%s y\n' % (b'9' * 5000))):
            chunks = []
            error = self.assertRaises(
                ValueError, chunks.extend,
                unix_notifier._chunks(line(0) + nonsense + line(1)))
            self.assertEqual([(line(0), 1, 0)], chunks)
            self.assertTrue(str(error).isprintable())
            self.assertLess(len(str(error)), 500)

    def test_relay_that_may_not_be_connected_to_is_no_stranger(self):
        self.pose_as_leader()
        follower = self.make_newcomer()
        with mock.patch('socket.socket.connect', autospec=True,
                        side_effect=PermissionError(errno.EPERM, 'no')):
            follower.look_again(9)
        self.assertLogged('relay refused', 0)
        self.assertLogged('held; its last owner')

    def test_leader_that_accepts_nobody_is_not_waited_for(self):
        relay = self.pose_as_leader(backlog=0)
        self.call_relay()
        follower = self.make_newcomer()
        thread = threading.Thread(target=follower.turn, daemon=True)
        thread.start()
        thread.join(PROMPT)
        waits = thread.is_alive()
        relay.close()       # or it would not end
        thread.join(WAIT)
        self.assertFalse(waits)

    def test_leader_that_hangs_up_each_time_is_asked_ever_less_often(self):
        relay, event = self.pose_as_leader(), unix_notifier._Event()
        follower = self.make_newcomer()
        now, waits = [time.monotonic()], []
        with fixtures.MonkeyPatch('time.monotonic', lambda: now[0]):
            for lasts in [0] * 10 + [60, 0]:
                follower.look_again()
                with relay.accept()[0] as leader:
                    socket.send_fds(
                        leader, [unix_notifier._HELLO + b' [1, 2, 3]\n'],
                        [relay.fileno(), event.fileno()])
                    self.step(follower)
                    now[0] += lasts
                self.step(follower, follower)
                # At once, it has asked again.
                waits.append(follower.uplink.sock is None
                             and follower.retry_at - now[0])
        self.assertEqual([False, False], [waits[0], waits[10]])
        self.assertTrue(0 < waits[11] <= 0.01 < 0.49 < waits[9] <= 1, waits)
        self.assertLogged('it hangs up each time')

    def says(self, relay, follower, data, passed):
        """A leader says it, and hears the end of the follower."""
        follower.look_again()
        follower.retry_at += WAIT   # not while we look what it has open
        with relay.accept()[0] as leader:
            leader.settimeout(WAIT)
            socket.send_fds(leader, [data], [
                each.fileno() for each in passed])
            self.step(follower)
            with contextlib.suppress(ConnectionResetError):
                while leader.recv(100):
                    pass

    def test_leader_that_says_no_hello_is_gone_and_is_told_of_once(self):
        relay = self.pose_as_leader()
        follower = self.make_newcomer()
        event, file = unix_notifier._Event(), open(self.path, 'w+')
        self.addCleanup(file.close)
        hello = unix_notifier._HELLO
        good = hello + b' [1, 2, 3]\n'
        words = [hello + b' %s\n' % each for each in (
            b'[1, 2', b'[1, 2]', b'[1, "2", 3]', b'{}', b'[' * 4000)]
        before = None
        for said in in_turn(self, (
                (b'x' * 5000, [relay] * 9),     # which is what is told
                (good, []), (good, [relay]), (good, [file, event]),
                (good, [file, file]), *((each, [relay, event]) for each in (
                    hello, *words, good[:9])))):
            self.says(relay, follower, *said)
            self.assertFalse(follower.follows)
            before = before or open_files()
            self.assertEqual(before, open_files())
        self.assertLogged('relay refused: the leader, pid %d' % os.getpid())
        self.assertLess(max(map(len, self.log.output.splitlines())), 500)
        self.assertLogged('Traceback', 0)
        follower.look_again()
        with relay.accept()[0] as leader:
            socket.send_fds(leader, [good], [relay.fileno(), event.fileno(),
                                             file.fileno()])
            self.step(follower)
            self.assertTrue(follower.follows)
        for each in follower.descriptors:
            self.assertFalse(os.get_inheritable(each))


# ---------------------------------------------------------------------------
# CONSUMERS: whoever reads the socket
# ---------------------------------------------------------------------------

class ConsumerTestCase(TestCase):

    """Gives each test a service at the path, which it plays itself."""

    def setUp(self):
        super().setUp()
        self.addCleanup(unix_notifier._warn_once.cache_clear)

    def serve(self, backlog=8):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self.server = listen(self.path, backlog)
        self.addCleanup(self.server.close)
        self.server.settimeout(WAIT)

    def connection(self):
        sock = self.server.accept()[0]
        self.addCleanup(sock.close)
        sock.settimeout(WAIT)
        return sock

    def subscribe(self, **kwargs):
        stream = unix_notifier.subscribe(self.path, **kwargs)
        self.addCleanup(stream.close)
        return stream

    def connected(self, **kwargs):
        """A subscription, and the service's end of it."""
        self.serve()
        stream = self.subscribe(**kwargs)
        return stream, self.connection()

    def in_thread(self, function):
        thread = threading.Thread(target=function, daemon=True)
        thread.start()
        self.addCleanup(thread.join, WAIT)
        return thread

    def flood(self, service, rubbish):
        """Have it send that without end."""
        def send():
            with contextlib.suppress(OSError):
                while True:
                    service.sendall(rubbish)

        self.in_thread(send)

    def assertPrintable(self, count, limit):
        """So many lines are in the log, none longer."""
        lines = self.log.output.splitlines()
        self.assertEqual(count, len(lines))
        for each in lines:
            self.assertTrue(each.isprintable() and len(each) < limit, each)


class LineBufferTest(base.BaseTestCase):

    def test_lines_come_out_whole(self):
        buffer = unix_notifier._LineBuffer()
        data = b''.join(line(number, number % 50) for number in range(100))
        for size in (1, 7, 100, len(data)):
            out = [buffer.feed(data[low:low + size])
                   for low in range(0, len(data), size)]
            self.assertEqual(data, b''.join(out))
            self.assertTrue(all(each[-1:] in (b'', b'\n') for each in out))

    def test_line_in_pieces_takes_little_more_than_its_bytes(self):
        buffer = unix_notifier._LineBuffer()
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for _ in range(20000):
            buffer.feed(b'xx')
        self.assertLess(tracemalloc.get_traced_memory()[1], 10 ** 5)
        self.assertEqual(b'x' * 40000 + b'\n', buffer.feed(b'\nyy'))
        self.assertEqual(b'yyz\n', buffer.feed(b'z\n'))

    def test_line_over_the_limit_is_kept_no_further(self):
        buffer = unix_notifier._LineBuffer(10)
        buffer.feed(b'ok\n' + b'x' * 10)
        self.assertFalse(buffer.too_long())
        for _ in range(100):
            buffer.feed(b'yyy')
        self.assertTrue(buffer.too_long())
        self.assertEqual(b'x' * 10 + b'yyyz\n', buffer.feed(b'z\nok'))
        self.assertFalse(buffer.too_long())
        self.assertEqual(b'ok\n', buffer.feed(b'\n'))


class SubscribeTest(ConsumerTestCase):

    def test_bad_path_is_named(self):
        for path in ('s', '/x/', 'unix://host/s', '/' + 'x' * 107):
            error = self.assertRaises(
                ValueError, unix_notifier.subscribe, path)
            self.assertIn(path, str(error))

    def test_it_is_connected_when_it_returns(self):
        """By a URI, too, and to a path as long as a socket's may be."""
        long = self.dir + '/' + 'x' * (106 - len(self.dir))
        for scheme, self.path in in_turn(self, (
                ('', self.path), ('unix://', self.path), ('', long))):
            self.serve()
            with unix_notifier.subscribe(scheme + self.path) as stream:
                self.connection().sendall(line(1))
                self.assertEqual(numbered(1), next(stream))
                self.assertEqual(line(1), stream.line + b'\n')

    def test_end_of_stream_ends_it_if_asked_to(self):
        stream, service = self.connected(reconnect=False)
        service.sendall(line(0) + line(1) + line(2)[:-1])
        service.close()
        self.assertEqual(2, account(list(stream)))
        self.assertEqual([], list(stream))

    def test_service_that_passes_descriptors_is_refused_or_cut_off(self):
        for guarded in in_turn(self, (unix_notifier._guarded, lambda: False)):
            self.patch('_guarded', guarded)
            stream, service = self.connected(reconnect=False)
            service.sendall(line(1))
            self.assertEqual(numbered(1), next(stream))
            reading, writing = os.pipe()
            self.addCleanup(os.close, reading)
            with contextlib.suppress(PermissionError):
                socket.send_fds(service, [line(2)], [writing])
            os.close(writing)
            service.close()
            self.assertEqual([], list(stream))
            # At last, whatever closes it.
            self.assertTrue(select.select([reading], [], [], WAIT)[0])

    def test_what_takes_long_to_close_holds_no_reader_up(self):
        for guarded, end in in_turn(self, itertools.product(
                (unix_notifier._guarded, lambda: False),
                (list, unix_notifier._Subscription.close))):
            self.patch('_guarded', guarded)
            stream, service = self.connected(reconnect=False)
            with lingering() as give:
                begin = time.monotonic()
                give(service)
                service.close()
                self.assertFalse(end(stream))
                self.assertLess(time.monotonic() - begin, PROMPT)

    def full(self):
        """A service that lets nobody in, until it accepts one more."""
        self.serve(0)
        first = socket.socket(socket.AF_UNIX)
        self.addCleanup(first.close)
        first.connect(self.path)

    def test_service_that_accepts_nobody_is_not_waited_for(self):
        self.full()
        streams = []
        self.in_thread(lambda: streams.append(self.subscribe())).join(PROMPT)
        self.addCleanup(self.server.close)      # or the thread would not end
        stream, = streams
        self.assertLogged('waiting for it: Resource')
        # The service was there, so what was missed by then is told.
        self.connection()
        self.in_thread(lambda: self.connection().sendall(line(1)))
        record = next(stream)
        self.assertEqual('notifications.interrupted', record['event_type'])
        self.assertLess(0.9, record['payload']['seconds'])
        self.assertEqual('the service let nobody in',
                         record['payload']['reason'])
        self.assertEqual(numbered(1), next(stream))

    def test_nothing_is_missing_from_before_the_service_was_there(self):
        stream = self.subscribe()
        stream._gap._seen_until -= 60
        for reason in 'the service let nobody in', 'the stream ended':
            for arrive in (bool, self.full):
                arrive()
                stream._retry.at = 0    # it is tried now
                self.assertIsNone(stream.take(time.monotonic() + 0.01))
            self.connection()
            service = self.reconnect(stream, line(1))
            self.assertLess(self.assertInterrupted(next(stream), reason),
                            PROMPT)
            self.assertEqual(numbered(1), next(stream))
            service.close()

    def test_place_in_a_full_backlog_is_waited_for(self):
        self.full()
        tries, connect = [], socket.socket.connect

        def spy(sock, path):
            tries.append(path)
            return connect(sock, path)

        with mock.patch('socket.socket.connect', spy):
            subscribing = self.in_thread(self.subscribe)
            wait_until(lambda: len(tries) > 1)
            self.connection()
            subscribing.join(PROMPT)
        self.assertLogged('connected')
        self.assertLogged('waiting for it', 0)

    def test_nobody_there_raises_if_asked_to(self):
        error = self.assertRaises(FileNotFoundError, unix_notifier.subscribe,
                                  self.path, reconnect=False)
        self.assertEqual(self.path, error.filename)

    def test_it_waits_for_the_service(self):
        before = open_files()
        stream = self.subscribe()
        wait_until(lambda: stream._retry.delay >= 0.01)

        def serve():
            self.serve()
            self.connection().sendall(line(1))

        self.in_thread(serve)
        self.assertEqual(numbered(1), next(stream))
        self.assertLogged('waiting for it: No such file')
        self.assertLogged('connected')
        self.assertLess(len(open_files() - before), 6)

    def come_back(self, *lines):
        """A subscription whose stream ended, and the next, which gives these.

        :returns: the subscription, and the service's end of it
        """
        stream, service = self.connected()
        service.sendall(line(0) + line(99)[:20])
        service.close()
        self.assertEqual(numbered(0), next(stream))
        return stream, self.reconnect(stream, *lines)

    def reconnect(self, stream, *lines):
        wait_until(lambda: stream.take(time.monotonic() + 0.01) or (
            select.select([self.server], [], [], 0)[0]))
        service = self.connection()
        service.sendall(b''.join(lines))
        return service

    def assertInterrupted(self, found, reason):
        self.assertEqual(KEYS, list(found))
        self.assertEqual(
            ('notifications.interrupted', 'WARN', ['seconds', 'reason']),
            (found['event_type'], found['priority'], list(found['payload'])))
        self.assertEqual(reason, found['payload']['reason'])
        return found['payload']['seconds']

    def test_interruption_is_told_before_what_comes_next(self):
        stream, service = self.come_back(b'rubbish\n', line(1), line(2))
        seconds = self.assertInterrupted(next(stream), 'the stream ended')
        self.assertTrue(0 < seconds < PROMPT, seconds)
        self.assertEqual(3, account([next(stream), next(stream)], 1))
        service.sendall(line(3))
        self.assertEqual(numbered(3), next(stream))

    def test_interruption_is_told_though_nothing_comes(self):
        self.patch('_Backoff.MAX', 0.2)
        stream, service = self.come_back()
        begin = stream._gap._at
        self.assertInterrupted(next(stream), 'the stream ended')
        self.assertGreater(time.monotonic() - begin, 0.19)
        begin = time.thread_time()
        self.assertIsNone(stream.take(time.monotonic() + 0.3))
        self.assertLess(time.thread_time() - begin, 0.1)
        service.sendall(line(1))
        self.assertEqual(numbered(1), next(stream))

    def test_interruption_includes_the_time_that_nobody_asked(self):
        stream, service = self.connected()
        service.sendall(line(0))
        service.close()
        stream._gap._seen_until -= 60    # both have waited since
        self.assertEqual(numbered(0), next(stream))
        service = self.reconnect(stream, line(1))
        seconds = self.assertInterrupted(next(stream), 'the stream ended')
        self.assertTrue(60 <= seconds < 60 + PROMPT, seconds)
        next(stream)
        for waiting in (lambda: threading.Timer(0.05, service.close).start(),
                        lambda: stream.take(0) or service.close()):
            stream._gap._seen_until -= 60
            waiting()
            self.assertIsNone(stream.take(time.monotonic() + 0.2))
            service = self.reconnect(stream, line(1))
            seconds = self.assertInterrupted(next(stream), 'the stream ended')
            self.assertLess(seconds, PROMPT)
            self.assertEqual(numbered(1), next(stream))

    def test_interruption_names_what_the_kernel_said(self):
        """And is told, however short lines may be."""
        stream, service = self.connected(max_line=10)
        stream._sock.send(b'unread')
        service.close()
        self.reconnect(stream, b'{"a": 1}\n')
        self.assertInterrupted(next(stream), 'Connection reset by peer')
        self.assertEqual({'a': 1}, next(stream))

    def test_who_is_refused_asks_ever_less_often_and_quietly(self):
        """All of that is one interruption, which begins with the first."""
        stream, service = self.connected()
        refused = unix_notifier._record('notifications.refused', reason='full')
        delays = []
        for number in range(5):
            service.sendall(refused)
            service.close()
            self.assertEqual('notifications.refused',
                             next(stream)['event_type'])
            if not number:
                begin = stream._gap._at
            self.assertEqual([], select.select([self.server], [], [], 0)[0])
            service = self.reconnect(stream)
            delays.append(stream._retry.delay)
        self.assertEqual([0.01, 0.02, 0.04, 0.08, 0.16], delays)
        self.assertLogged('refused: full')
        self.assertLogged('disconnected')
        service.sendall(line(1))
        seconds = self.assertInterrupted(next(stream), 'refused: full')
        self.assertGreaterEqual(
            seconds, round(stream._gap._at - begin, 3) - 0.1)
        self.assertEqual(numbered(1), next(stream))

    def test_connection_that_lasted_starts_afresh(self):
        stream, service = self.connected()
        stream._retry.delay = 1
        stream._gap._at -= 2
        service.close()
        stream._receive(stream._sock)
        self.assertEqual(0.01, stream._retry.delay)
        self.reconnect(stream)
        self.assertLogged(': connected', 2)

    def test_line_that_is_too_long_is_told_lost(self):
        stream, service = self.connected(max_line=1000)
        self.in_thread(lambda: service.sendall(
            line(1) + b'x' * 1001 + b'\n' + line(2) + b'x' * 10 ** 6
            + b'\n' + line(3)))
        messages = list(itertools.islice(stream, 5))
        self.assertEqual([1, 2, 3], [
            each['payload']['n'] for each in messages[::2]])
        for each in messages[1::2]:
            self.assertEqual('notifications.lost', each['event_type'])
            self.assertEqual({'lost': 1, 'reason':
                              'it took more than 1000 bytes'},
                             each['payload'])
        self.assertLogged('1 notifications were lost')

    def test_take_gives_up_in_time_whatever_comes(self):
        stream, service = self.connected()
        self.flood(service, b'[]\n' * 10000)
        begin = time.monotonic()
        self.assertIsNone(stream.take(begin + 0.1))
        self.assertLess(time.monotonic() - begin, PROMPT)
        stream.close()

    def test_take_gives_up_in_time_though_a_line_has_no_end(self):
        stream, service = self.connected()
        service.sendall(b'x')
        begin = time.monotonic()

        def receive(*_):
            self.assertLess(time.monotonic() - begin, PROMPT)
            return b''      # and there is always more

        self.patch('_LineBuffer.receive', receive)
        self.assertIsNone(stream.take(begin + 0.1))

    def test_line_is_an_object_or_dropped_which_is_logged_once(self):
        """A carriage return is white space, and what is no number null."""
        stream, service = self.connected()
        service.sendall(b'null\n[]\n\xff\n\n{"a"\n' + b'[' * 100000 + b'\n'
                        + b'{"a":\r1}\r\n{"b": [NaN, -Infinity]}\n')
        self.assertEqual([{'a': 1}, {'b': [None, None]}],
                         [next(stream), next(stream)])
        self.assertLogged('not a JSON object')

    def test_losses_are_logged_with_their_sum_once_a_second(self):
        stream, service = self.connected()
        for number in range(3):
            service.sendall(unix_notifier._lost_record(5, 'why'))
            self.assertEqual(5, next(stream)['payload']['lost'])
        self.assertLogged('5 notifications were lost')
        stream.log._lost_told -= 2
        service.sendall(unix_notifier._lost_record(5, 'why'))
        next(stream)
        self.assertLogged('20 notifications were lost')

    def test_what_others_say_does_no_harm_in_the_log(self):
        stream, service = self.connected()
        for reason in ('a\nb\x1b[2J' + 'x' * 9999, {'a': 1}, None):
            for record in unix_notifier._lost_record(1, reason), (
                    unix_notifier._record('notifications.refused',
                                          reason=reason)):
                service.sendall(record)
                next(stream)
        service.sendall(b'\x1b[2J' * 9999 + b'\n' + line(1))
        next(stream)
        self.assertPrintable(4, 500)

    def test_records_that_cannot_be_true_are_not_counted(self):
        stream, service = self.connected()
        for payload in in_turn(self, (
                None, [], 'x', {}, *({'lost': lost} for lost in (
                    -5, 10 ** 30, 1.5, True, '5', [], 5, -1, 10 ** 18)))):
            stream.log._lost_told -= 2
            service.sendall(unix_notifier._encode(
                {'event_type': 'notifications.lost', 'payload': payload}))
            self.assertEqual(payload, next(stream)['payload'])
        self.assertLogged(' 5 notifications were lost', 3)
        self.assertLogged(' 0 notifications were lost', 10)

    def test_leaving_the_loop_closes_the_socket(self):
        self.serve()
        before = open_files()
        for _ in range(3):
            streams = [unix_notifier.subscribe(self.path)]
            service = self.connection()
            service.sendall(line(0))
            for each in streams.pop():
                break
            self.assertEqual(b'', service.recv(1))
            service.close()
        self.assertEqual(before, open_files())

    def test_close_in_another_thread_ends_the_iteration(self):
        # Over and over: it may come before, in, or after the wait.
        self.serve()
        for _ in range(200):
            stream = self.subscribe()
            self.connection()
            thread = self.in_thread(lambda: list(stream))
            stream.close()
            thread.join(WAIT)
            self.assertFalse(thread.is_alive())
            self.assertEqual([], list(stream))

    def test_signal_that_closes_it_ends_the_iteration(self):
        stream, service = self.connected()
        self.addCleanup(signal.signal, signal.SIGALRM, signal.signal(
            signal.SIGALRM, lambda *_: stream.close()))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        self.assertEqual([], list(stream))
        self.assertEqual(b'', service.recv(1))

    def test_forked_child_that_closes_it_does_the_parent_no_harm(self):
        stream, service = self.connected()
        self.assertIsNone(stream.take(time.monotonic() + 0.01))
        self.assertEqual('', in_child(stream.close))
        threading.Timer(0.05, service.sendall, (line(1),)).start()
        self.assertEqual(numbered(1), next(stream))

    def test_forked_child_may_close_it_amid_reading(self):
        """As in a signal's handler, or a green thread."""
        stream, service = self.connected()
        service.sendall(line(1))
        select_ = unix_notifier._select
        for before in in_turn(self, (True, False)):

            def select_amid(*args):
                found = () if before else select_(*args)
                stream.close()
                return found or select_(*args)

            def read():
                self.patch('_select', select_amid)
                self.assertEqual([], list(stream))

            self.assertEqual('', in_child(read))

    def test_forked_child_can_close_it_though_the_parent_reads(self):
        stream, service = self.connected()
        self.in_thread(lambda: list(stream))
        wait_until(stream._reading.locked)

        def close():
            stream.close()
            assert stream._sock is None

        self.assertEqual('', in_child(close))
        copy = os.dup(stream._sock.fileno())    # such as another child has
        self.addCleanup(os.close, copy)
        stream.close()
        self.assertEqual(b'', service.recv(1))


class ListenerTest(ConsumerTestCase):

    def listener(self, *numbers, batch_size=1, topics=None):
        """One to which the service, self.service, has sent these."""
        self.serve()
        listener = unix_notifier._Listener(self.path, batch_size, topics)
        self.addCleanup(listener.cleanup)
        self.service = self.connection()
        self.send(*numbers)
        return listener

    def send(self, *numbers):
        self.service.sendall(b''.join(map(line, numbers)))

    @staticmethod
    def numbers(batch):
        return [each.message['payload']['n'] for each in batch]

    def assertPolled(self, expected, listener, **kwargs):
        self.assertEqual(list(expected),
                         self.numbers(listener.poll(**kwargs)))

    def test_poll_returns_at_most_batch_size(self):
        listener = self.listener(*range(5))
        self.assertPolled([0], listener)
        self.assertPolled([1, 2, 3], listener, batch_size=3)
        incoming, = listener.poll()
        self.assertEqual(('x', {}), (incoming.msg_id, incoming.ctxt))
        listener = self.listener(*range(300), batch_size=200)
        self.assertPolled(range(200), listener, batch_size=200)

    def test_poll_gives_up_in_time(self):
        listener = self.listener()
        self.assertPolled([], listener, timeout=0.01)
        self.send(1)
        self.assertPolled([1], listener, timeout=0.01, batch_size=2)
        # The time of a batch begins with the first.
        threading.Timer(0.05, self.send, (2,)).start()
        self.assertPolled([2], listener, batch_size=2, batch_timeout=0.01)

    def test_without_batch_size_it_is_what_has_come(self):
        listener = self.listener(batch_size=None)
        threading.Timer(0.05, self.send, (0,)).start()
        incoming, = listener.poll(batch_size=None)  # it waits for one
        self.assertEqual([0], self.numbers([incoming]))
        incoming.acknowledge()
        self.send(*range(250))
        self.assertPolled(range(100), listener, batch_size=None)

    def test_reading_stops_until_messages_are_acknowledged(self):
        listener = self.listener(*range(150))
        out = [listener.poll()[0] for _ in range(100)]
        begin = time.thread_time()
        self.assertPolled([], listener, timeout=0.2)
        self.assertLess(time.thread_time() - begin, 0.1)
        threading.Timer(0.05, out[50].acknowledge).start()
        self.assertPolled([100], listener)
        out[50].acknowledge()       # once more does no harm
        self.assertPolled([], listener, timeout=0.01)
        listener.stop()
        self.assertPolled([], listener)
        out[0].acknowledge()
        self.assertPolled([101], listener)
        self.assertPolled([], listener)

    def test_requeued_message_returns_and_nothing_waits_for_it(self):
        self.patch('_REQUEUE_FIRST', 0.1)
        listener = self.listener(0, 1, 2)
        first = listener.poll()[0]
        begin = time.monotonic()
        first.requeue()
        self.assertPolled([1], listener)
        self.assertPolled([2], listener)
        self.assertEqual([first], listener.poll())
        self.assertGreaterEqual(time.monotonic() - begin, 0.1)
        # It hears of that in another thread, too.
        threading.Timer(0.05, first.requeue).start()
        self.assertEqual([first], listener.poll(timeout=WAIT))

    def test_delay_doubles_up_to_its_limit(self):
        listener = self.listener(0)
        incoming, = listener.poll()
        delays = []
        for _ in range(7):
            incoming.requeue()
            delays.append(incoming.delay)
        self.assertEqual([1, 2, 4, 8, 16, 30, 30], delays)

    def test_requeued_message_returns_in_a_batch_of_its_own(self):
        """Else it has the others of its batch fail with it for ever."""
        self.patch('_REQUEUE_FIRST', 0.01)
        listener = self.listener(0, 1, batch_size=10)
        for each in listener.poll(batch_size=10, batch_timeout=0.01):
            each.requeue()
        wait_until(lambda: listener._put_off.first_due()[0] < time.monotonic())
        self.send(2)
        for number in range(3):
            self.assertPolled([number], listener, batch_size=10,
                              batch_timeout=0.01)
        self.send(3)
        batch = listener.poll(batch_size=10, batch_timeout=0.01)
        self.patch('_REQUEUE_FIRST', 0.5)   # after the next has come
        batch[0].requeue()
        self.send(4)
        for number in 4, 3:
            self.assertPolled([number], listener, batch_size=10,
                              batch_timeout=WAIT)

    def test_what_is_handed_out_is_bounded_in_bytes_too(self):
        self.patch('_HELD_MAX', 10 * 1024)
        listener = self.listener(*range(20), batch_size=20)
        batch = listener.poll(batch_size=20)
        self.assertEqual(list(range(10)), self.numbers(batch))
        self.assertPolled([], listener, timeout=0.01)
        batch[0].acknowledge()
        self.assertPolled([10], listener)

    def test_requeued_messages_that_do_not_fit_are_told_lost(self):
        """The account holds, also when the records are requeued."""
        self.patch('_HELD_MAX', 20 * 1024)
        self.patch('_REQUEUE_FIRST', 0.001)
        self.patch('_REQUEUE_MAX', 0.02)
        self.patch('_CHECK_INTERVAL', 0.01)
        listener = self.listener(*range(500))
        number = 0
        while number != 499:
            incoming, = listener.poll(timeout=WAIT)
            number = incoming.message['payload'].get('n')
            incoming.requeue()
        handled = told = 0
        while batch := listener.poll(timeout=0.1):
            lost = batch[0].message['payload'].get('lost', 0)
            told += lost
            handled += not lost
            batch[0].acknowledge()
        self.assertEqual(500, handled + told)
        self.assertLess(handled, 21)
        self.assertIn('gave up on x x, requeued', self.log.output)

    def test_records_that_cannot_be_true_are_given_up_as_none(self):
        listener = self.listener()
        self.service.sendall(b''.join(
            unix_notifier._lost_record(lost, 'why')
            for lost in (10 ** 30, -5, 'x', 2)) + line(0))
        batch = [listener.poll()[0] for _ in range(5)]
        self.patch('_HELD_MAX', 1024)
        for each in batch:
            each.requeue()
        incoming, = listener.poll(timeout=WAIT)
        self.assertEqual(3, incoming.message['payload']['lost'])

    def test_what_is_requeued_again_and_again_is_named(self):
        self.patch('_REQUEUE_FIRST', 0.001)
        self.patch('_REQUEUE_MAX', 0.001)
        listener = self.listener(0)
        for _ in range(10):
            listener.poll()[0].requeue()
        self.assertLogged('stuck: x x, requeued 3 times in')
        self.assertLogged('stuck')
        listener._tell_at = 0
        listener.poll()[0].acknowledge()
        self.assertLogged('stuck: x x, requeued 10 times in')
        listener.poll(timeout=0.01)
        self.assertLogged('stuck', 2)

    def test_what_others_say_does_no_harm_in_the_log(self):
        self.patch('_REQUEUE_FIRST', 0.001)
        self.patch('_REQUEUE_MAX', 0.001)
        listener = self.listener()
        evil = 'a\nb\x9b2J' + 'x' * 9999
        self.service.sendall(
            b'{"\xc2\x9b2J": "%s"}\n' % (b'x' * 9999) + unix_notifier._encode(
                dict(numbered(1), event_type=evil, message_id=evil)))
        for _ in range(3):
            listener.poll()[0].requeue()
        listener.poll()
        for text in 'no priority', 'stuck: a':
            self.assertLogged(text)
        self.assertPrintable(3, 1000)

    def test_what_is_never_settled_is_named(self):
        self.patch('_STUCK_FIRST', 0.2)
        listener = self.listener(*range(101))
        for _ in range(100):
            listener.poll()
        self.assertEqual([], listener.poll(timeout=0.05))
        self.assertLogged('stuck', 0)
        begin = time.thread_time()
        self.assertEqual([], listener.poll(timeout=0.3))
        self.assertLess(time.thread_time() - begin, 0.1)
        # A second time, too, if a busy machine has had it wait for longer.
        self.assertIn(self.log.output.count(
            'stuck: x x, requeued 0 times in 0 s; 100 handed out'), (1, 2))

    def test_stop_ends_poll_which_gives_what_it_holds(self):
        for _ in range(100):        # before, in, or after the wait
            listener = self.listener(0, 1, batch_size=10)
            batches = []
            thread = self.in_thread(lambda: batches.extend(
                listener.poll(batch_size=10) for _ in range(2)))
            wait_until(lambda: len(listener._unsettled) == 2)
            listener.stop()
            thread.join(WAIT)
            self.assertEqual([[0, 1], []], list(map(self.numbers, batches)))
            # Without cleanup(), which designate-sink never calls.
            self.assertEqual(b'', self.service.recv(1))

    def test_after_stop_it_hands_out_what_had_come(self):
        """But drops what was requeued, and says so, once."""
        self.patch('_REQUEUE_FIRST', 0)
        listener = self.listener(*range(5))
        out = [listener.poll()[0] for _ in range(3)]
        out[0].requeue()
        out[1].requeue()
        self.send(5)
        listener.stop()
        out[2].requeue()
        self.assertPolled([3], listener)
        self.assertPolled([4], listener)
        self.assertPolled([], listener)
        self.assertLogged('what was requeued (2) is dropped')
        self.assertLogged('requeued')

    def test_forked_child_can_stop_it_whoever_has_its_lock(self):
        listener = self.listener()
        with listener._lock:
            self.assertEqual('', in_child(listener.stop))

    def test_who_settles_twice_has_settled_once(self):
        listener = self.listener(0)
        incoming, = listener.poll()
        incoming.acknowledge()
        incoming.acknowledge()
        self.assertEqual(0, listener._unsettled.size)

    def test_loss_is_a_message_and_refusal_is_not(self):
        """Nor is what no dispatcher takes."""
        listener = self.listener()
        self.service.sendall(
            unix_notifier._record('notifications.refused', reason='full')
            + b'{}\n{"priority": null}\n'
            + unix_notifier._lost_record(3, 'why') + line(1))
        self.assertEqual({'lost': 3, 'reason': 'why'},
                         listener.poll()[0].message['payload'])
        self.assertPolled([1], listener)
        self.assertLogged('refused: full')
        self.assertLogged('no priority')

    def test_interruption_is_a_message(self):
        listener = self.listener(batch_size=10)

        def serve():
            for number in range(3):
                if number:
                    self.service = self.connection()
                self.send(number)
                self.service.close()

        self.in_thread(serve)
        for number in range(3):
            batch = listener.poll(batch_size=2 if number else 1)
            self.assertEqual(numbered(number), batch[-1].message)
            self.assertEqual(
                [('notifications.interrupted', 'WARN')] if number else [],
                [(each.message['event_type'], each.message['priority'])
                 for each in batch[:-1]])

    def test_who_reads_no_more_for_now_hears_of_no_interruption(self):
        self.patch('_Backoff.MAX', 0.01)
        listener = self.listener(*range(100))
        out = [listener.poll()[0] for _ in range(100)]
        self.service.close()
        begin = time.thread_time()
        self.assertEqual([], listener.poll(timeout=0.2))
        self.assertLess(time.thread_time() - begin, 0.1)
        out[0].acknowledge()
        incoming, = listener.poll()
        self.assertEqual('notifications.interrupted',
                         incoming.message['event_type'])

    def test_line_that_is_too_long_is_told_lost(self):
        listener = self.listener()
        self.in_thread(lambda: self.service.sendall(
            b'x' * (5 * 2 ** 20) + b'\n' + line(1)))
        incoming, = listener.poll()
        self.assertEqual(1, incoming.message['payload']['lost'])
        self.assertPolled([1], listener)

    def test_poll_gives_up_in_time_whatever_comes(self):
        listener = self.listener()
        self.flood(self.service, b'{}\n' * 10000)
        begin = time.monotonic()
        self.assertEqual([], listener.poll(timeout=0.1))
        self.assertLess(time.monotonic() - begin, PROMPT)
        listener.cleanup()

    def test_poll_does_not_raise_whatever_happens(self):
        self.patch('_Backoff.MAX', 0)
        listener = self.listener()
        with mock.patch.object(listener._subscription, 'take', autospec=True,
                               side_effect=MemoryError):
            self.assertEqual([], listener.poll())
        self.assertLogged('MemoryError')

    def test_what_is_of_its_topics_is_given_once(self):
        sent = (None, ['a'], ['b'], ['a', 'b'], [], ['notifications'], ['*'],
                'a', [['a'], {}, None], [None, 'b'])
        for asked, expected in in_turn(self, (
                ({'notifications'}, [0, 5, 7]), ({'a'}, [1, 3]),
                ({'a', 'b', 'c'}, [1, 2, 3, 9]), ({'c'}, []), (set(), []),
                (None, [*range(10)]))):
            listener = self.listener(batch_size=20, topics=asked)
            self.service.sendall(b''.join(unix_notifier._encode(
                numbered(number), topics=topics)
                for number, topics in enumerate(sent)))
            self.service.sendall(unix_notifier._lost_record(1, 'why'))
            *batch, record = listener.poll(batch_size=len(expected) + 1)
            self.assertEqual(expected, self.numbers(batch))
            # Who knows of which topic they were.
            self.assertEqual({'lost': 1, 'reason': 'why'},
                             record.message['payload'])

    def test_what_is_of_others_topics_takes_nothing(self):
        # More than may be unsettled.
        listener = self.listener(*range(150), topics={'a'})
        self.service.sendall(unix_notifier._encode(numbered(1), topics=['a']))
        self.assertPolled([1], listener, timeout=WAIT)
        self.assertEqual(1, len(listener._unsettled))

    def test_filter_on_the_context_matches_where_it_is_sent(self):
        """Where it is not, that is warned of, once."""
        rule = oslo_messaging.NotificationFilter(context={'tenant': '^x$'})
        listener = self.listener()

        def matches():
            incoming, = listener.poll()
            return rule.match(incoming.ctxt, 'x', 'x', {}, {})

        self.service.sendall(b''.join(
            unix_notifier._encode(numbered(0), ctxt=each) for each in (
                {'tenant': 'x'}, {'tenant': 'y'}, {'user': 'x'}, {})))
        self.service.sendall(unix_notifier._lost_record(1, 'why'))
        self.assertEqual([True] + [False] * 4,
                         [matches() for _ in range(5)])
        self.assertLogged('the request context', 0)
        for number, rest in enumerate((b'}\n', b', "context": "tenant"}\n')):
            unix_notifier._warn_once.cache_clear()
            self.service.sendall(2 * (line(0)[:-2] + rest))
            self.assertEqual([False] * 2, [matches(), matches()])
            self.assertLogged('the request context', number + 1)
        self.assertLogged('tenant', 2)


class TransportTest(ConsumerTestCase):

    def driver(self, url):
        conf = cfg.ConfigOpts()
        conf([])
        return unix_notifier.UnixTransportDriver(
            conf, oslo_messaging.TransportURL.parse(conf, url))

    def test_url_names_the_path(self):
        self.assertEqual('/run/x.sock',
                         self.driver('unix:///run/x.sock')._path)
        self.assertEqual('/run/a b%.sock',
                         self.driver('unix:///run/a%20b%25.sock')._path)

    def test_url_that_names_no_path_is_refused(self):
        for url, text in in_turn(self, (
                ('unix://', 'not an absolute path'),
                ('unix:///', 'not an absolute path'),
                ('unix:run/x', 'not an absolute path'),
                ('unix:///run/', 'not an absolute path'),
                ('unix://host/run/x', 'no host'),
                ('unix://user:pw@/run/x', 'no host'),
                ('unix:///run/x?a=b', 'query'),
                ('unix:///run/<service>', 'substituted'),
                ('unix:///' + 'x' * 107, 'limit is 107'))):
            error = self.assertRaises(oslo_messaging.InvalidTransportURL,
                                      self.driver, url)
            self.assertIn(text, str(error))

    def test_constructing_does_nothing(self):
        self.serve()
        before = open_files(), threading.active_count()
        driver = self.driver('unix://' + self.path)
        self.assertEqual(before, (open_files(), threading.active_count()))
        self.assertEqual([], select.select([self.server], [], [], 0)[0])
        driver.cleanup()

    def test_rpc_is_not_offered(self):
        driver = self.driver('unix:///x')
        self.assertRaises(NotImplementedError, driver.send, None, {}, {})
        self.assertRaises(NotImplementedError, driver.listen, None, 1, None)

    def test_what_is_sent_and_a_pool_are_warned_of_once(self):
        driver = self.driver('unix://' + self.path)
        for _ in range(2):
            driver.send_notification(None, {}, {}, 2.0, 0)
            driver.listen_for_notifications([], 'pool', 1, None).cleanup()
        self.assertLogged('use driver = unix')
        self.assertLogged('of a pool')

    def test_targets_name_the_topics(self):
        driver = self.driver('unix://' + self.path)
        for names, topics in in_turn(self, (
                ('ab', {'a', 'b'}), ('a*', None), ('', set()))):
            listener = driver.listen_for_notifications(
                [(oslo_messaging.Target(topic=name, exchange='any'), priority)
                 for name in names for priority in ('info', 'warn')],
                None, 1, None)
            self.addCleanup(listener.cleanup)
            self.assertEqual(topics, listener._poll_style_listener._topics)

    def test_real_servers(self):
        """Of both kinds, in one process, each gets all of its topics."""
        transport = oslo_messaging.transport.NotificationTransport(
            self.driver('unix://' + self.path))
        self.serve()
        data = b''.join(unix_notifier._encode(
            dict(numbered(number), priority='INFO'),
            topics=['a', 'b'] if number >= 5 else ['a'])
            for number in range(20))
        got = all_, both, one = [], [], []
        plain = types.SimpleNamespace(
            info=lambda *args: all_.append(args[3]['n']),
            filter_rule=oslo_messaging.NotificationFilter(event_type='^x$'))
        batch = types.SimpleNamespace(info=lambda messages: both.extend(
            each['payload']['n'] for each in messages))
        other = types.SimpleNamespace(
            info=lambda *args: one.append(args[3]['n']))
        servers = []
        for topics, endpoint, get, requeue in (
                ('*a', plain, 'get_notification_listener', True),
                ('ab', batch, 'get_batch_notification_listener', True),
                ('b', other, 'get_notification_listener', False)):
            servers.append(getattr(oslo_messaging, get)(
                transport,
                [oslo_messaging.Target(topic=each) for each in topics],
                [endpoint], 'threading', allow_requeue=requeue))
            servers[-1].start()
            self.connection().sendall(data)
        wait_until(lambda: list(map(len, got)) == [20, 20, 15])
        for server in servers:
            begin = time.monotonic()
            server.stop()
            self.assertLess(time.monotonic() - begin, PROMPT)
            server.wait()
        self.assertEqual([[*range(20)], [*range(20)], [*range(5, 20)]],
                         list(map(sorted, got)))


class CommandLineTest(base.BaseTestCase):

    def text(self, found):
        line = unix_notifier._text_line(found).decode()
        self.assertEqual('\n', line[-1])
        return line[:-1]

    def test_text_is_one_line_whatever_was_emitted(self):
        text = self.text(dict(
            message({'request_id': 'req-1\x1b[2J'}), event_type='a\nb\u202e'))
        self.assertEqual(
            'x  x  a\\nb\\u202e  x  req-1\\x1b[2J', text)

    def test_text_is_cut_where_nobody_would_read_on(self):
        deep = []
        for _ in range(10 ** 5):
            deep = [deep]
        for event_type in 'x' * 9999, deep:
            text = self.text(dict(message({}), event_type=event_type))
            self.assertLess(len(text), 300)

    OWNERS = {'user_id': 'u', 'tenant_id': 't', 'project_id': 'p'}
    # An event type, a payload, and what says most of it.
    IDS = (
        ('x', {'id': 'i', 'request_id': 'r'}, 'r'),
        ('x', {'id': 'i', 'resource_info': 's'}, 's'),
        ('x', {'n_object.data': {'uuid': 'u'}, 'id': 'i'}, 'u'),
        ('x', {'n_object.data': None, 'id': 'i'}, 'i'),
        ('x', {'id': {}}, 'x'), ('x', {}, 'x'), ('x', OWNERS, 'x'),
        ('x', 'text', 'x'), ('x', None, 'x'), (None, {'id': 1}, '1'),
        # nova
        ('compute.instance.volume.attach',
         {'volume_id': 'v', 'instance_id': 'i'}, 'i'),
        ('flavor.create', {'nova_object.data': {
            'flavorid': 'f', 'name': 'n'}}, 'f'),
        ('keypair.create.start', {'nova_object.data': {
            'user_id': 'u', 'name': 'n', 'type': 'ssh'}}, 'n'),
        ('keypair.create.start', {'key_name': 'n', **OWNERS}, 'n'),
        ('aggregate.create.end', {'name': 'n', 'aggregate_id': 7},
         '7'),
        # cinder
        ('volume.create.end', {
            'volume_id': 'v', 'snapshot_id': 's', **OWNERS}, 'v'),
        ('snapshot.delete.start', {
            'volume_id': 'v', 'snapshot_id': 's', **OWNERS}, 's'),
        ('volume_type.create', {'volume_types': {'id': 'y'}}, 'y'),
        ('scheduler.create_volume', {**OWNERS, 'volume_id': 'v'}, 'v'),
        # neutron
        ('network.create.end', {'network': {'id': 'n'}}, 'n'),
        ('port.create.end', {'ports': [{'id': 'p'}, {}]}, 'p'),
        ('port.create.end', {'ports': []}, 'x'),
        ('subnet.delete.end', {'subnet_id': 's'}, 's'),
        ('network.update.start', {'id': 'n', 'network': {}}, 'n'),
        ('router.interface.create', {
            'router_interface': {'port_id': 'p', 'id': 'r'}}, 'r'),
        # heat, manila, glance
        ('orchestration.stack.create.end', {
            'user_identity': 'u', 'stack_identity': 's', **OWNERS}, 's'),
        ('orchestration.autoscaling.end', {
            'user_identity': 'u', 'stack_identity': 's', **OWNERS}, 's'),
        ('share.create.start', {
            'snapshot_id': None, 'share_id': 's', **OWNERS}, 's'),
        ('image.member.create', {
            'member_id': 'm', 'image_id': 'i'}, 'i')
    )

    def test_text_ends_with_the_id_that_says_most(self):
        for event_type, payload, last in self.IDS:
            text = self.text(dict(
                message(payload), event_type=event_type))
            self.assertEqual([last], text.split('  ')[4:] or ['x'], text)

    def test_text_of_a_record_tells_all(self):
        for name, payload in in_turn(self, (
                ('lost', {'lost': 5, 'reason': 'why'}),
                ('interrupted', {'seconds': 0.5, 'reason': 'why'}))):
            text = self.text(json.loads(unix_notifier._record(
                'notifications.' + name, **payload)))
            self.assertTrue(text.endswith(json.dumps(payload)), text)

    def test_wrong_arguments_are_named(self):
        for argv, text in ((['x'], "'x' is not an absolute path"),
                           (['/x', '--count', '0'], 'less than the limit, 1'),
                           (['/x', '--event-type', '('], 'missing )')):
            errors = io.StringIO()
            with contextlib.redirect_stderr(errors):
                error = self.assertRaises(
                    SystemExit, unix_notifier.main, argv)
            self.assertEqual(2, error.code)
            self.assertIn(text, errors.getvalue())

    def test_help_begins_with_what_people_do(self):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            self.assertRaises(SystemExit, unix_notifier.main, ['--help'])
        words = output.getvalue()
        places = [words.index(each) for each in (
            '  unix-notifier /run', "  unix-notifier --event-type '^",
            '| jq .payload', 'options:', 'Exit status')]
        self.assertEqual(sorted(places), places)


class TerminalTest(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        self.use(COLUMNS='80', TERM='xterm', NO_COLOR=None)

    def use(self, **env):
        for name, value in env.items():
            self.useFixture(fixtures.EnvironmentVariable(name, value))

    @staticmethod
    def lines(*messages):
        lines = map(unix_notifier._Terminal().line, messages)
        return b''.join(lines).decode().splitlines()

    def recorded(self):
        """Notifications as services sent them, of five priorities."""
        with open(os.path.join(HERE, 'functional',
                               'notifications.ndjson')) as file:
            return [dict(json.loads(each), priority=priority)
                    for each, priority in zip(file, itertools.cycle(
                        ('INFO', 'WARN', 'ERROR', 'SAMPLE', 'CRITICAL')))]

    def printed(self, *argv, to, errors=None):
        """What it prints of a notification and a loss, to whom."""
        reading, output = to()
        stream = mock.MagicMock()
        stream.__iter__.return_value = [
            dict(message({'id': 'i'}), timestamp='2026-11-22 07:58:07.5'),
            json.loads(unix_notifier._lost_record(5, 'why'))]
        with open(output, 'w') as stdout, \
                mock.patch('sys.stdout', stdout), \
                mock.patch('sys.stderr', stdout if errors else io.StringIO()):
            unix_notifier._print(stream, unix_notifier._arguments(
                ['/x', *argv]))
        with open(reading, 'rb', buffering=0) as file:
            blocks = []
            with contextlib.suppress(OSError):  # a terminal's end
                while not blocks or blocks[-1]:
                    blocks.append(file.read(65536))
            return stream, b''.join(blocks).decode()

    def test_terminal_gets_columns_all_else_whole_lines(self):
        for argv, to, begin, is_whole in (
                ((), os.openpty, '07:58:07 x     x ', False),
                (('--text',), os.openpty, '07:58:07 x     x ', False),
                (('--json',), os.openpty, '{"message_id"', True),
                ((), os.pipe, '{"message_id"', True),
                (('--json',), os.pipe, '{"message_id"', True),
                (('--text',), os.pipe, '2026-11-22 07:58:07.5  x  x  x  i\n',
                 True)):
            _, text = self.printed(*argv, to=to)
            self.assertEqual(begin, text[:len(begin)], argv)
            self.assertEqual(is_whole, '\x1b' not in text)
            self.assertEqual(is_whole, '"lost": 5' in text)

    def test_terminal_shows_a_loss_whatever_was_asked_for_and_once(self):
        for errors in False, True:
            stream, text = self.printed('--event-type', 'none', to=os.openpty,
                                        errors=errors)
            self.assertEqual(1, text.count('\n'))
            self.assertIn(' notifications lost: 5 (why) ', text)
            stream.log.lost({})
            stream.log.refused('')
            self.assertEqual(2 * (not errors), len(stream.method_calls))

    def test_errors_do_not_name_the_path_at_a_terminal(self):
        handler = unix_notifier._StandardError('/x')
        for to, text in ((os.openpty, '-- connected\r\n'),
                         (os.pipe, 'Notifications from /x: connected\n')):
            reading, output = to()
            with open(reading, 'rb', buffering=0) as file, \
                    open(output, 'w') as stderr, \
                    mock.patch('sys.stderr', stderr):
                handler.emit(logging.makeLogRecord({
                    'msg': 'Notifications from /x: connected'}))
                self.assertEqual(text, file.read(100).decode())

    def test_columns_line_up(self):
        self.use(NO_COLOR='1')
        for columns, event_type, width in (('80', 15, 80), ('160', 30, 136)):
            self.use(COLUMNS=columns)
            messages = self.recorded()
            lines = self.lines(*messages)
            self.assertEqual(width, max(map(len, lines)))
            for each, line_ in zip(messages, lines):
                self.assertEqual(event_type, line_.index(each['event_type']))
                self.assertNotEqual(' ', line_[event_type + 37])
            publishers = [each['publisher_id'] for each in messages]
            self.assertEqual(publishers if columns == '160' else [], [
                line_[event_type + 78:] for line_ in lines
                if line_[event_type + 78:]])

    def test_line_is_no_wider_than_the_terminal_whatever_comes(self):
        self.use(NO_COLOR='1')
        evil = 'e\u0301\n\x1b[2J\x9b', '\u7f51\u7edc', 'x', '', 7, None, []
        for columns, size in itertools.product((1, 9, 20, 80, 160), (1, 60)):
            self.use(COLUMNS=str(columns))
            for each, event_type in itertools.product(
                    evil, ('x', *unix_notifier._CONTROL)):
                each = each * size if isinstance(each, str) else each
                line_, = self.lines(dict(
                    dict.fromkeys(KEYS, each), event_type=event_type,
                    payload={'id': each, 'reason': each, 'lost': each}))
                self.assertTrue(line_.isprintable())
                self.assertLessEqual(
                    sum(1 + (char in '\u7f51\u7edc') - (char == '\u0301')
                        for char in line_), columns)

    def test_wide_characters_do_not_move_what_follows(self):
        for name, places in (('ab', 2), ('\u7f51\u7edc', 4), ('e\u0301', 1)):
            self.assertEqual(name + (5 - places) * '.',
                             unix_notifier._pad(name, 5, '.'))
            self.assertEqual(name, unix_notifier._cut(name, places))
        for width, cut in ((1, '\u2026'), (2, '\u2026'), (3, '\u7f51\u2026')):
            self.assertEqual(cut, unix_notifier._cut('\u7f51\u7edc', width))

    def test_priority_has_a_colour_and_is_cut_to_its_column(self):
        for priority, shown in (
                ('INFO', '\x1b[32mINFO\x1b[m  x'), ('OTHER', 'OTHER x'),
                ('ERROR', '\x1b[1;31mERROR\x1b[m x'),
                ('CRITICAL', '\x1b[1;37;41mCRIT\u2026\x1b[m x')):
            line_, = self.lines(dict(message({}), priority=priority))
            self.assertEqual(9 * ' ' + shown, line_[:9 + len(shown)])

    def test_no_colour_where_it_is_not_wanted(self):
        messages = self.recorded() + [
            json.loads(unix_notifier._lost_record(5, 'why'))]
        self.assertEqual(101, len(self.lines(*messages)))
        for env, count in (({'NO_COLOR': ''}, 202), ({'NO_COLOR': '1'}, 0),
                           ({'NO_COLOR': None, 'TERM': 'dumb'}, 0)):
            self.use(**env)
            self.assertEqual(
                count, ''.join(self.lines(*messages)).count('\x1b'), env)

    def test_records_stand_out_across_the_terminal(self):
        payload = {'lost': 5, 'seconds': 0.5, 'reason': 'why'}
        for event_type, text in (
                ('lost', 'notifications lost: 5 (why)'),
                ('refused', 'refused (why)'),
                ('interrupted',
                 'interrupted: what came in 0.5 s may be missing (why)')):
            line_, = self.lines(dict(
                message(payload), timestamp='2026-11-22 07:58:07.870964',
                event_type='notifications.' + event_type))
            self.assertEqual(
                '\x1b[1;7;33m%s\x1b[m' % (
                    '07:58:07 ----- %s ' % text).ljust(80, '-'), line_)

    def test_refusals_in_a_row_are_one_line(self):
        refusal = json.loads(unix_notifier._record(
            'notifications.refused', reason='why'))
        self.assertEqual(3, len(self.lines(
            refusal, refusal, refusal, message({}), refusal, refusal)))
