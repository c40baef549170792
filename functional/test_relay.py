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

"""Every process on the path is heard as if it were the only one.

Guards against a relay that loses, doubles, cuts or reorders what processes
hand to the one that leads, that blocks or bloats those when it is stopped,
or wakes anybody without need: lines would be missing, come twice or not
parse, the numbers of a source would not ascend, what was received and what
was told to be lost would not add up, a call would take long, memory would
grow by what was emitted, or an idle process would be given the CPU.
"""

import os
import signal
import time

import base

BUFFER = base.MIB
# Beside the buffer: what the allocator and the interpreter take.
SLACK = 6 * base.MIB


class RelayTest(base.RelayTestCase):

    def test_eight_processes_on_one_path(self):
        workers = self.start_workers(8, buffer_size=64 * base.MIB)
        subscribers = [self.subscribe() for _ in range(3)]
        for worker in workers:
            worker.tell('emit', count=500, threads=3, size=100)
        for worker in workers:
            worker.answer()
        # Order and doubles are checked line by line.
        for subscriber in subscribers:
            self.assert_complete(subscriber, 8 * 3 * 500)
        orders = {tuple(message['message_id']
                        for message in subscriber.messages)
                  for subscriber in subscribers}
        self.assertEqual(1, len(orders))

    def test_processes_that_start_while_others_emit(self):
        workers = self.start_workers(2, buffer_size=64 * base.MIB)
        subscriber = self.subscribe()
        for worker in workers:
            worker.ask('start', pause=0.001)
        for _ in range(10):
            newcomer = self.worker()
            newcomer.ask('emit', count=20)
            newcomer.tell('leave', count=20)
            self.parent.ask('reap', pid=newcomer.pid)
        emitted = sum(worker.ask('stop') for worker in workers)
        self.assert_complete(subscriber, emitted + 10 * 40)

    def test_notification_right_after_connect_arrives(self):
        leader, *followers = self.start_workers(3)
        # At first nobody else is there, then somebody, then the leader is
        # busy.
        for disturb in (lambda: None, self.subscribe,
                        lambda: leader.ask('start', pause=0.001)):
            disturb()
            for follower in followers:
                follower.tell('rounds', count=200, path=self.path)
            for follower in followers:
                self.assertEqual([], follower.answer())

    def test_stopped_leader_harms_no_follower(self):
        leader, *followers = self.start_workers(3, buffer_size=BUFFER)
        healthy = self.subscribe()
        emitted = sum(self.emit_in_rounds(follower, healthy, 5)
                      for follower in followers)
        before = [base.memory(follower.pid) for follower in followers]
        for _ in range(3):
            base.stop(leader.pid)
            for follower in followers:
                follower.tell('emit', count=5000, size=1000)
            for follower in followers:
                # It waits for nobody. (A busy machine takes its time.)
                self.assertLess(follower.answer()['slowest'], 1)
            emitted += 10000
            for follower, memory in zip(followers, before):
                self.assertLess(base.memory(follower.pid) - memory,
                                BUFFER + SLACK)
            leader.kill(signal.SIGCONT)
            self.assert_accounted(healthy, emitted)
        self.assertGreater(healthy.lost, 10000)
        # On a busy machine it is too slow itself, and skips what says so.
        self.assertTrue({'relay stalled', 'subscriber too slow'}.intersection(
            healthy.reasons), healthy.reasons)
        self.emit_in_rounds(followers[0], healthy, 2)
        self.assert_accounted(healthy, emitted + 200)

    def test_follower_that_starts_while_the_leader_is_stopped(self):
        leader, = self.start_workers(1)
        subscriber = self.subscribe()
        leader.ask('emit', count=1)
        for round_ in range(1, 11):
            base.stop(leader.pid)
            follower = self.worker()
            follower.ask('emit', count=100)
            leader.kill(signal.SIGCONT)
            subscriber.wait(1 + 100 * round_)
            self.kill_worker(follower)
        self.assert_complete(subscriber, 1001)

    def test_follower_killed_in_the_middle_of_a_line(self):
        leader, steady = self.start_workers(2, buffer_size=256 * base.MIB)
        subscriber = self.subscribe()
        steady.ask('start', pause=0.001)
        # More than the kernel holds: without a stop it has to be in halves.
        for number in range(60):
            victim = self.worker()
            victim.ask('start', pause=0.002, size=400000)
            base.wait_until(
                lambda: any(message['payload']['source'] == '%d/1' % victim.pid
                            for message in list(subscriber.messages)),
                'something of the victim')
            if number % 3 == 0:
                base.stop(leader.pid)
                victim.ask('emit', count=2, size=400000)
            self.kill_worker(victim)
            leader.kill(signal.SIGCONT)
            subscriber.messages.clear()
        emitted = steady.ask('stop')
        steady.ask('start', pause=0.001)
        base.wait_until(
            lambda: any(message['payload']['source'] == '%d/1' % steady.pid
                        and message['payload']['number'] > emitted
                        for message in list(subscriber.messages)),
            'the other one goes on')
        steady.ask('stop')
        # What the victims sent is whole, and of the other's nothing is
        # missing: both are checked line by line.
        self.assertEqual(0, subscriber.lost)

    def test_subscriber_skips_a_record_that_was_relayed(self):
        leader, follower = self.start_workers(2, buffer_size=BUFFER)
        healthy = self.subscribe()
        lagging = self.subscribe(go=False)
        emitted = self.emit_in_rounds(follower, healthy, 3)
        base.stop(leader.pid)
        follower.ask('emit', count=5000, size=1000)
        emitted += 5000
        leader.kill(signal.SIGCONT)
        self.assert_accounted(healthy, emitted)
        self.assertIn('relay stalled', healthy.reasons)
        emitted += self.emit_in_rounds(follower, healthy, 30)
        lagging.go()
        self.assert_accounted(lagging, emitted)
        # Or else it was sent to it, and nothing was shown.
        self.assertEqual({'subscriber too slow'}, set(lagging.reasons))
        follower.ask('emit', count=10)
        for subscriber in (healthy, lagging):
            self.assert_accounted(subscriber, emitted + 10)

    def test_loss_in_the_follower_itself_is_told(self):
        leader, follower = self.start_workers(2, buffer_size=65536)
        subscriber = self.subscribe()
        # Nobody can keep up with that, as little as there is room.
        follower.ask('emit', count=2000, threads=4, size=10000)
        self.assert_accounted(subscriber, 8000)
        self.assertGreater(subscriber.lost, 0)

    def test_idle_processes_are_idle(self):
        workers = self.start_workers(3)
        for somebody in (False, True):
            if somebody:
                subscriber = self.subscribe()
            for worker in workers:
                worker.ask('emit', count=1)
            if somebody:
                subscriber.wait(3)
            # The commands themselves have to have been done.
            self.wait_idle(workers)
            before = [base.switches(worker.pid) for worker in workers]
            self.assert_never(
                lambda: before != [base.switches(worker.pid)
                                   for worker in workers],
                'a process was given the CPU', 1.5)

    def test_nothing_is_sent_while_nobody_is_there(self):
        leader, follower = self.start_workers(2)
        # So that the follower has met the leader.
        self.subscribe().close()
        follower.ask('emit', count=1)
        leader.ask('emit', count=1)
        self.wait_idle([leader, follower])
        # It may have looked last before the subscriber had gone: the turn
        # after the next notification finds out.
        follower.ask('emit', count=1)
        self.wait_idle([leader, follower])
        task, = (task for task in os.listdir('/proc/%d/task' % follower.pid)
                 if int(task) != follower.pid)

        def switches():
            """Of the follower's loop."""
            return int(base.status(
                follower.pid, '/proc/%%d/task/%s/status' % task)[
                    'voluntary_ctxt_switches'])

        before = base.switches(leader.pid), switches()
        begin = time.monotonic()
        for _ in range(100):
            follower.ask('emit', count=40)
            self.assertEqual(0, follower.ask('queued'))
        self.assertEqual(before[0], base.switches(leader.pid))
        # Its own loop does no more than look after the path.
        self.assertLess(switches() - before[1],
                        5 * (time.monotonic() - begin + 1))
