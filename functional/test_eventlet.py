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

"""Processes under eventlet.monkey_patch() publish as others do.

Guards against a loop that holds up all green threads of the process, or that
is held up by them; against green threads that two wait for one descriptor,
which eventlet forbids, that switch in the middle of a notify(), or that go
on in a forked child: the service would stand still, or its notifications
would never come, or come from two loops at once.
"""

import importlib.util
import os
import time

import base

PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)),
                       'eventlet_publisher.py')


class EventletTest(base.FunctionalTestCase):

    def setUp(self):
        if importlib.util.find_spec('eventlet') is None:
            self.skipTest('eventlet is not installed')
        super().setUp()

    def green(self, *when, **options):
        """Start publishers that are monkey-patched.

        :param when: for each: before or after the driver is imported
        """
        return self.publishers(*(
            dict(options, program=(PROGRAM, each)) for each in when))

    def assert_heard_at_once(self, *publishers, count=100):
        """Fail unless what follows a connect() at once arrives.

        :returns: how many notifications that were
        """
        for publisher in publishers:
            self.assertEqual([], publisher.ask('rounds', count=count,
                                               path=self.path))
        return count * len(publishers)

    def test_leader_and_followers(self):
        leader, other = publishers = self.green('before', 'after')
        publishers.append(self.publisher())
        self.assert_heard_at_once(*publishers)
        subscriber = self.subscribe()
        emitted = self.assert_heard_at_once(*publishers)
        for publisher in publishers:
            publisher.tell('emit', count=250, threads=4, size=500)
        for publisher in publishers:
            publisher.answer()
            emitted += 1000
        self.assert_complete(subscriber, emitted)
        for publisher in publishers:
            self.assertEqual([], publisher.troubles())

    def test_follower_takes_over(self):
        publishers = self.green('before', 'after', 'before')
        subscriber = self.subscribe()
        for publisher in publishers:
            publisher.ask('start', threads=2, pause=0.001)
        subscriber.wait(100)
        leader = self._leader(publishers)
        leader.kill()
        subscriber.wait_end()
        publishers.remove(leader)
        heir = self.subscribe()
        heir.wait(100)
        for publisher in publishers:
            publisher.ask('stop')
        self._leader(publishers)
        self.assert_heard_at_once(*publishers)
        for publisher in publishers:
            self.assertEqual([], publisher.troubles())

    def _leader(self, publishers):
        def leaders():
            return [publisher for publisher in publishers
                    if publisher.log('served with mode')]

        base.wait_until(leaders, 'one leads')
        leader, = leaders()
        return leader

    def test_native_threads_publish_too(self):
        publisher, = self.green('before')
        subscriber = self.subscribe()
        publisher.ask('emit_natively', count=1000)
        self.assert_complete(subscriber, 1000)

    def test_nobody_is_held_up(self):
        publishers = self.green('before', 'before')
        leader = self._leader(publishers)
        subscriber = self.subscribe()
        stopped = self.cat(leader)
        stopped.stop()
        for publisher in publishers:
            publisher.ask('tick')
            # Half a buffer, from where a native publisher would give way.
            self.assertEqual([], publisher.ask(
                'emit_traced', count=5000, size=1000))
            for _ in range(10):
                publisher.ask('emit', count=1000, size=1000)
                publisher.ask('rest', seconds=0.02)
            # A call of emit() holds them up itself, for as long as it takes.
            self.assertLess(publisher.ask('longest_gap'), 1)
            self.assertEqual([], publisher.log('Traceback'))
        self.assert_accounted(subscriber, 30000)
        stopped.resume()
        self.assert_accounted(stopped, 30000)

    def test_idle_costs_nothing(self):
        publishers = self.green('before', 'before')
        subscriber = self.subscribe()
        for publisher in publishers:
            publisher.ask('emit', count=10)
        self.assert_complete(subscriber, 20)
        base.wait_until(lambda: self._are_idle(publishers),
                        'no wake-up for half a second')

    def _are_idle(self, publishers):
        before = [base.switches(publisher.pid) for publisher in publishers]
        time.sleep(0.5)
        return before == [base.switches(publisher.pid)
                          for publisher in publishers]

    def test_fork(self):
        for how in 'fork', 'forked', 'renewed':
            parent, = self.green('before')
            subscriber = self.subscribe()
            children = [self.fork(parent, how)]
            parent.ask('emit', count=10)
            children.append(self.fork(parent, how))
            self._check_family(parent, children, subscriber, 10)

    def test_fork_amid_notifications(self):
        parent, = self.green('before')
        subscriber = self.subscribe()
        parent.ask('start', threads=2, pause=0.001)
        # Not the others: the green threads that emit would go on in them.
        children = [self.fork(parent, 'renewed') for _ in range(3)]
        emitted = parent.ask('stop')
        self._check_family(parent, children, subscriber, emitted)

    def _check_family(self, parent, children, subscriber, emitted):
        for child in children:
            # The first one starts the loop, and lets others run.
            self.assertLessEqual(
                set(child.ask('emit_traced', count=20)), {0})
            child.tell('emit', count=100, pause=0.001)
        parent.ask('emit', count=100, pause=0.001)
        emitted += 100
        for child in children:
            child.answer()
            emitted += 120
        self.assert_complete(subscriber, emitted)
        emitted += self.assert_heard_at_once(parent, *children, count=20)
        # The last words.
        children.pop().tell('leave', how='exit', count=100)
        emitted += 100
        self.assert_complete(subscriber, emitted)
        self.assertFalse(subscriber.ended.is_set(), subscriber)
        parent.kill()
        subscriber.wait_end()
        # One of the children leads now.
        base.wait_heir(self.path, parent.pid)
        heir = self.subscribe()
        for child in children:
            child.ask('emit', count=100)
        self.assert_complete(heir, 100 * len(children))
        self.assert_heard_at_once(*children, count=20)
        self.assertEqual([], parent.troubles())
        heir.close()
        parent.close()

    def test_fork_in_a_green_thread(self):
        parent, = self.green('before')
        subscriber = self.subscribe()
        parent.ask('emit', count=10)
        child = self.fork(parent, 'green')
        child.ask('emit', count=100)
        child.tell('leave', how='exit', count=100)
        self.assert_complete(subscriber, 210)
        parent.ask('emit', count=10)
        self.assert_complete(subscriber, 220)

    def test_fork_a_child_that_opens_nothing_else(self):
        # What its driver opens first gets the numbers of what it inherited,
        # for which the parent's loop still waits, as far as eventlet knows.
        parent, = self.green('before')
        subscriber = self.subscribe()
        parent.ask('emit', count=10)
        for number in range(1, 4):
            pid = parent.ask('fork_to_emit', count=50)
            parent.ask('emit', count=10)
            self.assert_complete(subscriber, 10 + number * 60)
            self.assertEqual(0, parent.ask('reap', pid=pid))
        self.assertEqual([], parent.troubles())

    def test_last_words(self):
        publishers = self.green('before', 'before')
        leader = self._leader(publishers)
        publishers.remove(leader)
        follower, = publishers
        subscriber = self.subscribe()
        for publisher, how in (follower, 'exit'), (leader, 'return'):
            publisher.tell('leave', how=how, count=2000, size=100)
            self.assertEqual(0, publisher.wait_exit())
            self.assertLess(publisher.exit_seconds(), 0.9)
        if leader.exit_seconds() < base.EXIT_STALL:
            self.assert_complete(subscriber, 4000)
        subscriber.wait_end()
        self.assertFalse(os.path.exists(self.path))

    def test_many_descriptors(self):
        # Of which select.select() knows nothing.
        publishers = [
            self.publisher(is_open=False, program=(PROGRAM, 'before'))
            for _ in range(2)]
        for publisher in publishers:
            publisher.ask('hold', number=1100)
            publisher.ask('open')
        subscriber = self.subscribe()
        for publisher in publishers:
            publisher.ask('emit', count=1000)
        self.assert_complete(subscriber, 2000)
        publishers[0].kill()
        subscriber.wait_end()
        base.wait_heir(self.path, publishers[0].pid)
        heir = self.subscribe()
        publishers[1].ask('emit', count=1000)
        self.assert_complete(heir, 1000)
