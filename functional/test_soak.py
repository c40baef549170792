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

"""A short run of soak.py, and whether its books would tell.

Guards against a soak that does not run any more, or one that finds nothing
because it has forgotten how to: it would be noticed by nobody else.
"""

import json
import os
import subprocess
import sys
import uuid

import fixtures
from oslotest import base as test_base
from testtools import content

import base
import soak

# soak.py with another program for its processes, which comes first, and
# without some of the actions.
SOAK = """
import sys
import soak
soak.SOAK_PUBLISHER = sys.argv.pop(1)
soak.ACTIONS = dict.fromkeys(sys.argv.pop(1).split(), 1) or soak.ACTIONS
sys.exit(soak.main())
"""
# Such a program: every hundredth notify() does more than it should, or less.
# The driver is imported no sooner than it would be, or its exit handler would
# come after what takes its time.
BROKEN = """
import itertools
import os
import time
import publisher
import soak_publisher

calls, kept = itertools.count(1), []


class Service(soak_publisher.Service):

    def load(self):
        import unix_notifier
        notify = unix_notifier.UnixDriver.notify

        def broken(*arguments):
            if next(calls) %% 100:
                return notify(*arguments)
            %s

        unix_notifier.UnixDriver.notify = broken
        super().load()


publisher.main(Service)
"""


class SoakTest(test_base.BaseTestCase):

    DEFAULT_TIMEOUT = 90

    def _soak(self, program=soak.SOAK_PUBLISHER, actions=''):
        """One settlement at the start, and one of each kind."""
        done = subprocess.run(
            [sys.executable, '-c', SOAK, program, actions,
             '--seconds', '1', '--seed', '1'],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=80, env=dict(os.environ, PYTHONPATH=os.pathsep.join([
                os.path.dirname(soak.__file__),
                os.environ.get('PYTHONPATH', '')])))
        self.addDetail('output', content.text_content(done.stdout))
        return done

    def test_smoke(self):
        done = self._soak()
        self.assertEqual(0, done.returncode)
        self.assertEqual(3, done.stdout.count('settled:'))

    def _assert_found(self, fault, complaint, actions=''):
        program = os.path.join(self.useFixture(fixtures.TempDir()).path,
                               'broken.py')
        with open(program, 'w') as file:
            file.write(BROKEN % fault)
        done = self._soak(program, actions)
        self.assertEqual(1, done.returncode)
        self.assertRegex(done.stdout, 'VIOLATED .*' + complaint)

    def test_silent_loss_is_found(self):
        self._assert_found('pass', 'reported lost')

    def test_silent_loss_with_the_leader_is_found(self):
        self._assert_found(
            'unix_notifier._Lock.vacated = lambda _: True\n'
            '            notify(*arguments)', 'reported lost',
            'rush kill_leader_awaited')

    def test_nonsense_is_found(self):
        self._assert_found('unix_notifier._encode = lambda *_: b"{\\n"',
                           'JSONDecodeError')

    def test_death_is_found(self):
        self._assert_found('os._exit(0)', 'has ended')

    def test_repetition_is_found(self):
        self._assert_found('notify(*arguments); notify(*arguments)',
                           'came twice')

    def test_blocked_call_is_found(self):
        self._assert_found('time.sleep(0.1); notify(*arguments)',
                           'was blocked for')

    def test_growing_memory_is_found(self):
        self._assert_found('kept.append(b"x" * 2 ** 22); notify(*arguments)',
                           'grew from')

    def test_leaking_descriptors_are_found(self):
        self._assert_found('os.dup(0); notify(*arguments)',
                           'at most .* descriptors')


class LedgerTest(test_base.BaseTestCase):

    """A connection that two threads emitted ten for each, from 1 on."""

    def setUp(self):
        super().setUp()
        self.ledger = soak.Ledger('reader')
        self.ledger.begin([0, 0, 0], [0, 0, 0])

    def _feed(self, *entries):
        """Each is a thread and a number, or how many were lost."""
        for entry in entries:
            lost = not isinstance(entry, tuple)
            message = dict.fromkeys(base.Account.KEYS)
            message['message_id'] = str(uuid.uuid4())
            message['event_type'] = 'notifications.lost' if lost else 'event'
            message['payload'] = (
                {'lost': entry, 'reason': 'test'} if lost else
                {'source': str(entry[0]), 'number': entry[1], 'pad': ''})
            self.ledger.feed(json.dumps(message).encode('ascii') + b'\n')

    def _numbers(self, slot, first, last):
        return [(slot, number) for number in range(first, last + 1)]

    def _check(self, cut=()):
        self.assertEqual([], self.ledger.problems)
        self.ledger.check([0, 10, 10], set(cut))

    def _assert_wrong(self):
        self.assertRaises(soak.Violation, self._check)

    def test_all(self):
        self._feed(*self._numbers(1, 1, 10), *self._numbers(2, 1, 10))
        self._check()

    def test_none(self):
        self._assert_wrong()

    def test_lost_in_silence_at_the_end(self):
        self._feed(*self._numbers(1, 1, 10), *self._numbers(2, 1, 9))
        self._assert_wrong()

    def test_lost_in_silence_in_between(self):
        self._feed((1, 1), (1, 3))
        self.assertEqual(1, len(self.ledger.problems))

    def test_lost_in_silence_at_the_beginning(self):
        self._feed((1, 2))
        self.assertEqual(1, len(self.ledger.problems))

    def test_left_out_before_connect(self):
        """Nobody was there when it was emitted, but when the rest came."""
        for first, problems in ((6, 0), (7, 1)):
            self.ledger = soak.Ledger('reader')
            self.ledger.begin([0, 0, 10], [0, 5, 10])
            self._feed((1, 2), *self._numbers(1, first, 10))
            self.assertEqual(problems, len(self.ledger.problems))

    def test_lost_and_reported(self):
        self._feed(*self._numbers(1, 1, 3), (2, 1), 8,
                   *self._numbers(1, 7, 10), *self._numbers(2, 7, 10))
        self._check()

    def test_too_few_or_too_many_reported(self):
        for lost in (7, 9):
            self.ledger = soak.Ledger('reader')
            self.ledger.begin([0, 0, 0], [0, 0, 0])
            self._feed(*self._numbers(1, 1, 10), (2, 1), (2, 2), lost)
            self._assert_wrong()

    def test_twice(self):
        self._feed((1, 1), (1, 1))
        self.assertEqual(1, len(self.ledger.problems))

    def test_twice_by_two_connections(self):
        self._feed((1, 1), (1, 2))
        self.ledger = soak.Ledger('reader', self.ledger.last)
        self._feed((1, 2))
        self.assertEqual(1, len(self.ledger.problems))

    def test_never_emitted(self):
        self._feed(*self._numbers(1, 1, 11), *self._numbers(2, 1, 10))
        self._assert_wrong()

    def test_on_its_way_at_connect(self):
        """It may come, or be lost, or not."""
        owed = self._numbers(1, 6, 10)
        for entries in (owed, [(1, 5), *owed], [(1, 2), 2, (1, 5), *owed],
                        [5, *owed]):
            self.ledger = soak.Ledger('reader')
            self.ledger.begin([0, 0, 10], [0, 5, 10])
            self._feed(*entries)
            self._check()

    def test_cut_off_by_its_end(self):
        """What comes after the last is not owed; what is before is."""
        self._feed(*self._numbers(1, 1, 10), *self._numbers(2, 1, 4))
        self._check(cut=[2])
        self._assert_wrong()

    def test_begun_anew(self):
        self._feed(*self._numbers(1, 1, 5), 5, *self._numbers(2, 6, 10))
        self.ledger.begin([0, 5, 10], [0, 5, 10])
        self._assert_wrong()
        self._feed(*self._numbers(1, 6, 10))
        self._check()
