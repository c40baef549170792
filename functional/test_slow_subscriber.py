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

"""A subscriber that does not keep up harms only itself, and knows what of.

Guards against a slow or stopped subscriber that blocks the service, makes it
grow, disturbs its neighbours, gets a line cut in two, or loses lines without
being told: memory would grow by what was emitted, a call would take long,
a healthy subscriber would miss something, or what a slow one received and
what it was told to have lost would not add up to what was emitted.
"""

import os
import re

import base

BUFFER = base.MIB
# Beside the buffer: what the allocator and the interpreter take.
SLACK = 4 * base.MIB


class SlowSubscriberTest(base.FunctionalTestCase):

    def test_stopped_subscriber_harms_only_itself(self):
        publisher = self.publisher(buffer_size=BUFFER)
        healthy = self.subscribe()
        stopped = self.cat(publisher)
        emitted = self.emit_in_rounds(publisher, healthy, 8, 250)
        self.assert_complete(stopped, emitted)
        stopped.stop()
        before = base.memory(publisher.pid)
        emitted += self.emit_in_rounds(publisher, healthy, 40, 250)
        self.assertLess(base.memory(publisher.pid) - before, BUFFER + SLACK)
        stopped.resume()
        self.assert_accounted(stopped, emitted)
        # At least what is in the buffer has survived, and all that follows.
        self.assertGreater(stopped.received, 2000 + BUFFER // 1300 // 2)
        publisher.ask('emit', count=10)
        self.assert_complete(healthy, emitted + 10)
        self.assert_accounted(stopped, emitted + 10)
        self.assertEqual({'subscriber too slow'}, set(stopped.reasons))

    def test_log_tells_who_lags_once_at_the_start_and_once_at_the_end(self):
        publisher = self.publisher(buffer_size=BUFFER)
        healthy = self.subscribe()
        stopped = self.cat(publisher)
        for round_ in (1, 2):
            lost = stopped.lost
            stopped.stop()
            emitted = self.emit_in_rounds(publisher, healthy, 12, 250)
            # The second within a second of the first.
            base.wait_until(
                lambda: len(publisher.log('lagging by more')) == round_,
                'the log tells that it lags')
            stopped.resume()
            self.assert_accounted(stopped, round_ * emitted)
            base.wait_until(
                lambda: len(publisher.log('caught up')) == round_,
                'the log tells that it caught up')
            line = publisher.log('caught up')[-1]
            self.assertEqual(stopped.lost - lost,
                             int(re.search(r'lost (\d+)', line)[1]))
        who = 'pid %d, uid %d' % (stopped.pid, os.getuid())
        self.assertEqual([True] * 4, [line.startswith('WARNING')
                                      and who in line
                                      for line in publisher.troubles()])

    def test_subscriber_that_never_reads(self):
        publisher = self.publisher(buffer_size=BUFFER)
        healthy = self.subscribe()
        clogged = self.subscribe(go=False)
        before = base.memory(publisher.pid)
        # Many threads, so that the loop is short of time: it is outrun.
        slowest = publisher.ask('emit', count=2000, threads=10,
                                size=1000)['slowest']
        self.assertLess(base.memory(publisher.pid) - before, BUFFER + SLACK)
        # It never waits for anybody. (A busy machine takes its time.)
        self.assertLess(slowest, 1)
        self.assert_accounted(healthy, 20000)
        self.assertLess(publisher.ask('queued'), 2)
        clogged.close()
        line = publisher.wait_log('parted')
        self.assertIn('pid %d, uid %d' % (os.getpid(), os.getuid()), line)
        self.assertLess(10000, int(re.search(r'(\d+) lost', line)[1]))

    def test_subscriber_that_starts_to_read_late(self):
        publisher = self.publisher(buffer_size=BUFFER)
        late = self.subscribe(go=False)
        publisher.ask('emit', count=10000, threads=2, size=1000)
        late.go()
        self.assert_accounted(late, 20000)
        self.assertGreater(late.lost, 10000)

    def test_slow_subscribers_share_one_buffer(self):
        publisher = self.publisher(buffer_size=4 * BUFFER)
        healthy = self.subscribe()
        clogged = [self.subscribe(go=False) for _ in range(20)]
        before = base.memory(publisher.pid)
        emitted = self.emit_in_rounds(publisher, healthy, 40, 250)
        self.assertLess(base.memory(publisher.pid) - before,
                        4 * BUFFER + SLACK)
        self.assertLess(emitted * 1000, 3 * (4 * BUFFER))
        for subscriber in clogged:
            subscriber.go()
        for subscriber in clogged:
            self.assert_accounted(subscriber, emitted)
        self.assert_complete(healthy, emitted)

    def test_lines_are_lost_one_by_one_under_load(self):
        """Lagging starts and ends often, each time within a line."""
        publisher = self.publisher(buffer_size=65536)
        subscribers = [self.subscribe(go=False) for _ in range(2)]
        publisher.ask('start', threads=2, size=30000)
        for _ in range(300):
            for subscriber, size in zip(subscribers, (10007, 100003)):
                subscriber.feed(subscriber.sock.recv(size))
        emitted = publisher.ask('stop')
        for subscriber in subscribers:
            subscriber.go()
            self.assert_accounted(subscriber, emitted)
            self.assertGreater(len(subscriber.reasons), 2)
