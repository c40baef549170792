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


"""Whatever is appended, sent in part and skipped: the account adds up.

Guards against a line that is cut or sent twice, a loss that is not reported
or not in its place, a backlog that outgrows its bound, and a reader that
stumbles over what a service sends. hypothesis makes up the histories, the same
ones in each run.
"""

import collections
import contextlib
import json
import re
import socket
import threading
import time

import fixtures
import hypothesis
from hypothesis import stateful
from hypothesis import strategies
import netaddr
from oslo_serialization import jsonutils
from oslotest import base

import unix_notifier

LIMIT = 4000
SETTINGS = hypothesis.settings(
    derandomize=True, max_examples=150, stateful_step_count=40, deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck))


class Socket:

    """Takes as many bytes as it is allowed to."""

    def __init__(self):
        self.room = 0
        self.data = bytearray()

    def sendmsg(self, buffers, _ancillary, _flags):
        if not self.room:
            raise BlockingIOError
        data = b''.join(buffers)[:self.room]
        self.room -= len(data)
        self.data += data
        return len(data)

    def send(self, data, flags):
        return self.sendmsg([data], (), flags)


def account(lines, number):
    """The number of the notification after the last of the lines.

    Fails unless each is in its place, or a record stands there for it.
    """
    for line in lines:
        if line.startswith(b'-'):
            number += int(line[1:].split()[0])
            continue
        message = json.loads(line)      # which none that was cut would be
        if 'payload' in message:
            number += message['payload']['lost']
        else:
            assert message['n'] == number, (message['n'], number)
            number += 1
    return number


def shared(chunk):
    """The chunk of all, before which those of one subscriber start."""
    while chunk.next and chunk.next.start == chunk.start:
        chunk = chunk.next
    return chunk


class Machine(stateful.RuleBasedStateMachine):

    """Subscribers of one backlog, each with a socket of its own."""

    def __init__(self):
        super().__init__()
        self.backlog = unix_notifier._Backlog(LIMIT)
        self.emitted = 0
        self.subscribers = {}       # with the number of their first

    @stateful.rule()
    def join(self):
        subscriber = unix_notifier._Subscriber(Socket(), self.backlog, '')
        self.subscribers[subscriber] = self.emitted

    @stateful.rule(sizes=strategies.lists(
        strategies.integers(0, 1500), min_size=1, max_size=8),
        chunk=strategies.sampled_from([500, 2000]))
    def emit(self, sizes, chunk):
        lines = []
        for size in sizes:
            lines.append(json.dumps({'n': self.emitted, 'pad': 'x' * size}
                                    ).encode() + b'\n')
            self.emitted += 1
        before = unix_notifier._CHUNK_MAX
        unix_notifier._CHUNK_MAX = chunk
        try:
            self.backlog.extend(lines)
        finally:
            unix_notifier._CHUNK_MAX = before

    @stateful.rule(lost=strategies.integers(1, 1000))
    def lose(self, lost):
        self.backlog.append(b'', 0, lost, 'queue full')
        self.emitted += lost

    @stateful.precondition(lambda self: self.subscribers)
    @stateful.rule(data=strategies.data(), room=strategies.integers(0, 5000))
    def send(self, data, room):
        subscriber = data.draw(strategies.sampled_from(
            list(self.subscribers)))
        if subscriber.sock is not None and subscriber.pending():
            subscriber.sock.room = room
            subscriber.flush()

    @stateful.rule()
    def trim(self):
        for subscriber in self.subscribers:
            before = shared(subscriber.chunk)
            moved = subscriber.trim(self.backlog)
            chunk = shared(subscriber.chunk)
            assert not moved or chunk is not before
            assert (self.backlog.behind(chunk) <= LIMIT
                    or chunk.next.next is None)
            while before is not chunk:      # which it could not stay at
                assert self.backlog.behind(before) > LIMIT
                before = before.next

    @stateful.invariant()
    def account_adds_up(self):
        for subscriber in self.subscribers:
            sent = sum(line.startswith(b'{"n"')
                       for line in self.lines(subscriber))
            assert subscriber.received() == sent

    @stateful.invariant()
    def what_was_sent_is_in_place(self):
        for subscriber, first in self.subscribers.items():
            account(self.lines(subscriber), first)

    def lines(self, subscriber):
        """All whole lines that it has sent."""
        return subscriber.sock.data.split(b'\n')[:-1]

    def teardown(self):
        for subscriber, first in self.subscribers.items():
            self.drain(subscriber)
            assert account(self.lines(subscriber), first) == self.emitted

    def drain(self, subscriber):
        while subscriber.pending():
            subscriber.sock.room = 10 ** 6
            subscriber.flush()


class UplinkMachine(Machine):

    """A follower, whose leaders come and go in the middle of lines."""

    def __init__(self):
        super().__init__()
        uplink = unix_notifier._Uplink(self.backlog, None)
        self.subscribers[uplink] = 0
        self.uplink = uplink
        self.received = []      # whole lines, by the leaders that went

    join = None

    @stateful.precondition(lambda self: self.uplink.sock is None)
    @stateful.rule()
    def follow(self):
        self.uplink.sock = Socket()
        self.uplink.greeted, self.uplink.blocked = True, False

    @stateful.precondition(lambda self: self.uplink.sock is not None)
    @stateful.rule()
    def leader_goes(self):
        self.received += self.uplink.sock.data.split(b'\n')[:-1]
        self.uplink.disconnect()

    def lines(self, uplink):
        if uplink.sock is None:
            return self.received
        return self.received + uplink.sock.data.split(b'\n')[:-1]

    def drain(self, uplink):
        """Lead: who waited begins where the uplink was."""
        if uplink.sock is not None:
            self.leader_goes()
        heir = unix_notifier._Subscriber(Socket(), self.backlog, '',
                                         start=uplink)
        super().drain(heir)
        lines = super().lines(heir)
        assert heir.received() == sum(b'"n"' in line for line in lines)
        self.received += lines


class ModelTest(base.BaseTestCase):

    def test_subscribers(self):
        stateful.run_state_machine_as_test(Machine, settings=SETTINGS)

    def test_uplink(self):
        stateful.run_state_machine_as_test(UplinkMachine, settings=SETTINGS)


class LineBufferTest(base.BaseTestCase):

    def test_however_a_stream_is_cut_its_lines_come_out_whole(self):
        @hypothesis.settings(SETTINGS, max_examples=500)
        @hypothesis.given(strategies.lists(strategies.binary(max_size=20)))
        def check(pieces):
            buffer = unix_notifier._LineBuffer()
            blocks = [buffer.feed(piece) for piece in pieces]
            whole, newline, rest = b''.join(pieces).rpartition(b'\n')
            self.assertEqual(whole + newline, b''.join(blocks))
            self.assertEqual(rest + b'\n', buffer.feed(b'\n'))

        check()


class RelayTest(base.BaseTestCase):

    def test_whatever_a_follower_sends_its_account_adds_up(self):
        words = strategies.lists(strategies.sampled_from(
            [b'{"a": 1}\n', b'-0 look\n', b'-1 x\n', b'-12 queue full\n',
             b'{}\n-2 y\n' * 200, b'-3 z\n' * 200, b'\n', b'-\n', b'-1\n',
             b'-%s x\n' % (b'9' * 19)]) | strategies.binary(max_size=5))

        def account(blocks):
            lines = lost = 0
            try:
                for block in blocks:
                    for chunk in unix_notifier._chunks(block):
                        self.assertEqual(chunk[1], chunk[0].count(b'\n'))
                        lines, lost = lines + chunk[1], lost + sum(chunk[2:3])
            except ValueError:
                return lines, lost, 'nonsense'
            return lines, lost

        @hypothesis.settings(SETTINGS, max_examples=300)
        @hypothesis.given(words)
        def check(parts):
            lines = re.findall(rb'[^\n]*\n', b''.join(parts))
            one_by_one = account(lines)
            if one_by_one[-1] != 'nonsense':
                self.assertEqual(one_by_one, account([b''.join(lines)]))

        check()


# What a service may send that is no notification, or a strange one.
RUBBISH = strategies.binary(max_size=30).map(
    lambda data: data.replace(b'\n', b'')) | strategies.sampled_from((
        b'null', b'[1]', b'NaN', b'[' * 2000, b'{"a":' * 2000, b'9' * 5000,
        b'\xef\xbb\xbf{}', b'x' * (LIMIT + 1)))
VALUES = strategies.recursive(strategies.sampled_from((
    b'NaN', b'1e999', b'-1', b'"\\ud800"', b'"\\uDe00\\\\ud83d\\ude00"',
    b'null', b'true', b'\t1\r', b'"\\u001b[2J"', '"\x9b\u202e"'.encode(),
    b'9' * 19, b'notifications.lost', b'"notifications.refused"')),
    lambda inner: (
        strategies.lists(inner).map(
            lambda each: b'[%s]' % b','.join(each))
        | strategies.dictionaries(strategies.sampled_from((
            b'lost', b'reason', b'id', b'x_id', b'event_type', b'priority',
            b'payload', b'n_object.data')), inner).map(
                lambda each: b'{%s}' % b','.join(
                    b'"%s":%s' % item for item in each.items()))),
    max_leaves=10)


def refuse(constant):
    raise ValueError(constant)


def is_strict(line):
    try:
        message = json.loads(line.decode(), parse_constant=refuse)
        json.dumps(message, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False
    return isinstance(message, dict)


class ReaderTest(base.BaseTestCase):

    """Whatever a service sends, readers go on, and count what they miss."""

    def setUp(self):
        super().setUp()
        self.path = self.useFixture(fixtures.TempDir()).join('s')
        self.listener = socket.socket(socket.AF_UNIX)
        self.addCleanup(self.listener.close)
        self.listener.bind(self.path)
        self.listener.listen()
        self.log = self.useFixture(fixtures.FakeLogger())

    def patch(self, name, value):
        self.useFixture(fixtures.MonkeyPatch(
            unix_notifier.__name__ + '.' + name, value))

    def test_subscription(self):
        def good(number):
            return b'{"n": %d}' % number

        @hypothesis.settings(SETTINGS)
        @hypothesis.given(strategies.lists(VALUES | RUBBISH | strategies.none(
            )), strategies.lists(strategies.integers(1, 50)), RUBBISH)
        def check(values, cuts, rest):
            lines = [good(number) if value is None else value
                     for number, value in enumerate(values)]
            data = b''.join(line + b'\n' for line in lines) + rest
            stream = unix_notifier.subscribe(self.path, reconnect=False,
                                             max_line=LIMIT)
            service = self.listener.accept()[0]
            thread = threading.Thread(target=send, args=(service, data, cuts))
            thread.start()
            messages = list(stream)
            thread.join()
            self.assertEqual(
                [json.loads(line) for line in lines if line[:4] == b'{"n"'],
                [each for each in messages if 'n' in each])
            told = sum(each.get('payload') == {
                'lost': 1, 'reason': 'it took more than %d bytes' % LIMIT}
                for each in messages)
            self.assertEqual(sum(len(line) > LIMIT for line in lines), told)
            self.assertLessEqual(
                sum(map(is_strict, lines)) + told, len(messages))
            for message in messages:
                self.assertTrue(is_strict(unix_notifier._strict(message)))
                if b'1e999' not in data:
                    json.dumps(message, allow_nan=False)
                for line in (unix_notifier._strict(message),
                             unix_notifier._text_line(message)):
                    self.assertTrue(line[:-1].decode().isprintable(), line)

        check()
        self.assertNotIn('Traceback', self.log.output)
        self.assertTrue(all(len(line) < 500 and line.isprintable()
                            for line in self.log.output.splitlines()))

    def test_listener(self):
        self.patch('_HELD_MAX', 3 * 1024)
        self.patch('_REQUEUE_FIRST', 5e-3)
        self.patch('_REQUEUE_MAX', 1e-2)
        self.patch('_CHECK_INTERVAL', 1e-3)

        @hypothesis.settings(SETTINGS)
        @hypothesis.given(strategies.lists(strategies.sampled_from((
            'send', 'rubbish', 'acknowledge', 'requeue', 'requeue', 'poll',
            'batch')), max_size=200))
        def check(steps):
            listener = unix_notifier._Listener(self.path, 3)
            service = self.listener.accept()[0]
            held, sent, done = collections.deque(), 0, 0

            def settle(incoming):
                lost = incoming.message['event_type'] == 'notifications.lost'
                incoming.acknowledge()
                return incoming.message['payload']['lost'] if lost else 1

            for step in steps:
                if step == 'send':
                    service.sendall(
                        5 * b'{"event_type": "x", "priority": "x"}\n')
                    sent += 5
                elif step == 'rubbish':
                    service.sendall(b'{}\nx\n[]\n')
                elif step in ('poll', 'batch'):
                    batch = listener.poll(0, 3 if step == 'batch' else 1)
                    held.extend(batch)
                    self.assertLess(len(held), 4)
                elif held and step == 'requeue':
                    held.popleft().requeue()
                elif held:
                    done += settle(held.popleft())
            deadline = time.monotonic() + 10
            while done < sent and time.monotonic() < deadline:
                held.extend(listener.poll(0.001))
                while held:
                    done += settle(held.popleft())
            self.assertEqual(sent, done)
            listener.stop()
            service.close()

        check()
        self.assertNotIn('Traceback', self.log.output)


def send(sock, data, cuts):
    with sock, contextlib.suppress(OSError):
        for cut in cuts:
            sock.sendall(data[:cut])
            data = data[cut:]
        sock.sendall(data)


class Endless:

    def __iter__(self):
        return self

    def __next__(self):
        raise AssertionError('it was asked')


def tangled(values):
    """A list that holds itself, and twice what the values are in."""
    inner = {'values': values}
    inner['again'] = [inner, values]
    return [inner, inner]


class EncodeTest(base.BaseTestCase):

    def test_whatever_is_emitted_is_one_line_of_strict_json(self):
        # Half surrogate pairs, and text that looks like one, included.
        text = strategies.text(
            strategies.characters() | strategies.sampled_from(
                '\ud83d\ude00\U0001f600\ud7a3\\ud8c'), max_size=9)
        plain = (strategies.none() | strategies.booleans()
                 | strategies.integers() | strategies.floats() | text
                 | strategies.binary(max_size=20)
                 | strategies.datetimes() | strategies.uuids()
                 | strategies.complex_numbers() | text.map(ValueError)
                 | strategies.ip_addresses().map(str).map(netaddr.IPNetwork)
                 | strategies.builds(Endless))
        payloads = strategies.recursive(plain, lambda inner: (
            strategies.lists(inner, max_size=5)
            | strategies.dictionaries(
                plain.filter(lambda each: each is not None)
                | strategies.tuples(text), inner, max_size=5)
            | strategies.lists(inner, max_size=3).map(tangled)
            | strategies.lists(plain, max_size=3).map(collections.UserList)
            | strategies.frozensets(plain, max_size=3)), max_leaves=20)

        def parse(line):
            message = json.loads(line, parse_constant=refuse)
            json.dumps(message, ensure_ascii=False).encode()
            return message

        @hypothesis.settings(SETTINGS, max_examples=500)
        @hypothesis.given(payloads)
        def check(payload):
            message = {'event_type': 'x', 'payload': payload}
            for mask in (False, True):
                line = unix_notifier._encode(message, mask)
                self.assertTrue(line.isascii())
                self.assertEqual(len(line) - 1, line.index(b'\n'))
                self.assertEqual({'event_type', 'payload'}, set(parse(line)))
            # Nothing here is a secret, and nobody's iterator was asked.
            self.assertEqual(parse(line),
                             parse(unix_notifier._encode(message)))
            try:
                log = jsonutils.dumps(message)
                parse(log)
            except (ValueError, TypeError, AssertionError):
                return      # it prints nothing that is strict JSON
            self.assertEqual(log.encode() + b'\n',
                             unix_notifier._encode(message))

        check()
