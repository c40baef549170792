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

"""A process that ends delivers what it has emitted, and ends soon.

Guards against a short-lived process whose last words are lost, an exit that
waits for a subscriber who never reads, and a path that is left behind or
taken from its next owner: the stream would end early, the exit handlers
would take long, or a socket file would be there that should not, or not be
there that should.
"""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time

import base

# Modules that are still held are cleared one by one, in reverse. Without the
# GIL, more of them are.
OUTLIVE = """
import json, sys
from oslo_config import cfg
import unix_notifier
conf = cfg.ConfigOpts()
conf([])
unix_notifier.register_opts(conf)
conf.set_override('sock_path', sys.argv[1],
                  group='oslo_messaging_notifications')
sys.held = json, unix_notifier
json.held = [unix_notifier.UnixDriver(conf),
             unix_notifier.subscribe(sys.argv[1] + '2')]
"""


class DeliveryTest(base.FunctionalTestCase):

    """Emit, and leave at once."""

    COUNT = 1000

    def _leave(self, how, status, **kwargs):
        publisher = self.publisher(**kwargs)
        subscribers = [self.subscribe() for _ in range(3)]
        for subscriber in subscribers:
            # Or the three, at a third of a MiB, check for EXIT_STALL.
            subscriber.size = 64 * 1024
        publisher.tell('leave', how=how, count=self.COUNT, size=500)
        self.assertEqual(status, publisher.wait_exit())
        for subscriber in subscribers:
            self.assert_complete(subscriber, self.COUNT)
            subscriber.wait_end()
            self.assertEqual(b'', subscriber.rest)
        self.assertEqual(['s.lock'], os.listdir(os.path.dirname(self.path)))

    def test_returning_from_main(self):
        self._leave('return', 0)

    def test_sys_exit(self):
        self._leave('exit', 0)

    def test_unhandled_exception(self):
        self._leave('raise', 1, tracebacks=True)

    def test_sigterm_that_is_handled(self):
        publisher = self.publisher()
        subscriber = self.subscribe()
        publisher.ask('handle_sigterm')
        publisher.ask('emit', count=self.COUNT, size=500)
        publisher.kill(signal.SIGTERM)
        self.assertEqual(0, publisher.wait_exit())
        self.assert_complete(subscriber, self.COUNT)
        self.assertFalse(os.path.exists(self.path))

    def test_sigterm_that_is_not_handled(self):
        publisher = self.publisher()
        subscriber = self.subscribe()
        publisher.ask('emit', count=self.COUNT, size=500)
        publisher.kill(signal.SIGTERM)
        self.assertEqual(-signal.SIGTERM, publisher.wait_exit())
        subscriber.wait_end()
        # What came is whole and without a gap; see Account.
        self.assertEqual(0, subscriber.lost)
        self.assertTrue(os.path.exists(self.path))      # nobody is left to
        self.assertEqual([], publisher.log('exit handlers'))
        publisher = self.publisher()
        subscriber = self.subscribe()
        publisher.ask('emit', count=1)
        self.assert_complete(subscriber, 1)

    def test_threads_that_still_emit(self):
        publisher = self.publisher()
        subscriber = self.subscribe()
        publisher.ask('start', threads=4)
        subscriber.wait(1000)
        publisher.tell('leave', how='exit')
        self.assertEqual(0, publisher.wait_exit())
        subscriber.wait_end()
        # A second, and what it takes to get the GIL beside the four.
        self.assertLess(publisher.exit_seconds(), 2)
        self.assertEqual([], publisher.troubles())

    def test_notifications_of_a_process_that_lives_for_a_moment(self):
        """Nobody had the time to connect; it ends all the same."""
        publisher = self.publisher(is_open=False)
        publisher.tell('open')
        publisher.tell('leave', count=10)
        self.assertEqual(0, publisher.wait_exit())
        self.assertLess(publisher.exit_seconds(), 0.5)
        self.assertFalse(os.path.exists(self.path))

    def test_what_outlives_the_module_is_quiet(self):
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', OUTLIVE, self.path],
            capture_output=True, timeout=60)
        self.assertEqual((0, b'', b''),
                         (done.returncode, done.stdout, done.stderr))


class LastWordsTest(base.RelayTestCase):

    """No handler runs, and nobody waits for the loop."""

    def _last_words(self, of_leader):
        workers = self.start_workers(2)
        for how in 'kill', '_exit':
            for count, readers in itertools.product((1, 5, 20), (1, 16)):
                subscribers = [self.subscribe() for _ in range(readers)]
                for worker in workers:
                    worker.ask('emit', count=1)
                for each in subscribers:
                    each.wait(2)
                victim, = (each for each in workers if of_leader == (
                    each.pid == self.leader_pid()))
                self.wait_idle(workers)
                victim.tell('leave', how=how, count=count)
                for each in subscribers:
                    self.assert_complete(each, 2 + count)
                    each.close()
                self.parent.ask('reap', pid=victim.pid)
                workers.remove(victim)
                self.wait_leader(workers)
                workers.append(self.worker())
                # Once it follows it can hand something over.
                with contextlib.closing(self.subscribe()) as other:
                    workers[1].ask('emit', count=1)
                    other.wait(1)

    def test_of_a_leader(self):
        self._last_words(True)

    def test_of_a_follower(self):
        self._last_words(False)


class DelayTest(base.FunctionalTestCase):

    """How long the exit handlers take. (Busy machines get a bit more.)"""

    def _fill(self, publisher):
        """Emit more than the kernel holds for one that does not read."""
        publisher.ask('emit', count=2000, size=1000)

    def _leave(self, publisher):
        publisher.tell('leave')
        publisher.wait_exit()
        return publisher.exit_seconds()

    def test_nobody_connected(self):
        publisher = self.publisher()
        publisher.wait_log('served')
        publisher.ask('emit', count=10)
        self.assertLess(self._leave(publisher), 0.09)

    def test_idle_subscribers(self):
        publisher = self.publisher()
        subscribers = [self.subscribe() for _ in range(10)]
        publisher.ask('emit', count=10)
        for subscriber in subscribers:
            self.assert_complete(subscriber, 10)
        self.assertLess(self._leave(publisher), 0.09)

    def test_stalled_subscriber(self):
        publisher = self.publisher()
        healthy = self.subscribe()
        stalled = self.subscribe(go=False)
        self._fill(publisher)
        self.assertLess(self._leave(publisher), 0.3)
        self.assert_complete(healthy, 2000)
        # It gets what the kernel held, and the end.
        stalled.go()
        stalled.wait_end()

    def test_slow_subscriber_has_a_second(self):
        publisher = self.publisher()
        slow = self.subscribe(go=False)
        healthy = self.subscribe()
        self._fill(publisher)
        self.assert_complete(healthy, 2000)
        publisher.tell('leave')
        while data := slow.sock.recv(16384):
            # It never stalls, but would take three seconds.
            slow.feed(data)
            time.sleep(0.02)
        publisher.wait_exit()
        self.assertLess(publisher.exit_seconds(), 1.3)
        # More than the kernel held from the start, less than all.
        self.assertGreater(slow.received, 250)
        self.assertLess(slow.received, 2000)
        # And it did not serve the path again meanwhile.
        self.assertEqual(1, len(publisher.log('served')))

    def test_slow_subscriber_that_makes_it(self):
        publisher = self.publisher()
        slow = self.subscribe(go=False)
        publisher.ask('emit', count=1000, size=1000)
        publisher.tell('leave')
        while data := slow.sock.recv(base.MIB):
            slow.feed(data)
            time.sleep(0.01)
        self.assert_complete(slow, 1000)


class PathTest(base.FunctionalTestCase):

    """The socket file after the exit."""

    def test_socket_of_another_program_is_kept(self):
        publisher = self.publisher()
        publisher.wait_log('served')
        os.unlink(self.path)
        with socket.socket(socket.AF_UNIX) as foreign:
            foreign.bind(self.path)
            foreign.listen(5)
            before = os.lstat(self.path)
            publisher.tell('leave')
            publisher.wait_exit()
            self.assertTrue(os.path.samestat(before, os.lstat(self.path)))
