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

"""A fork makes one more publisher, and otherwise goes unnoticed.

Guards against a child that disturbs or imitates its parent: the parent's
subscribers would see the end of the stream or miss something, a line of the
parent would come twice, what the child emits would not arrive, not even its
last words, or the path would have no leader after the parent's death since
the child holds what it inherited.
"""

import importlib.util
import multiprocessing
import os
import signal
import socket

import base

# In this order: multiprocessing wants to join its children in processes that
# are no children of its own making.
HOW = ('fork', 'multiprocessing', 'thread', 'forkserver', 'spawn')
# These come with nothing of their parent's but what they are told.
AFRESH = ('forkserver', 'spawn')
# What leaves the exit handlers, or their like, the time to run.
ENDS = ('return', 'exit')


class ForkTest(base.RelayTestCase):

    def _start(self, leads, **options):
        """A process that emits and forks; a subscriber of the path."""
        if leads:
            parent = self.publisher(**options)
        else:
            self.publisher(**options)
            # Which may be served by the time this one is asked.
            self.subscribe().close()
            parent = self.publisher(**options)
        return parent, self.subscribe()

    def _fork(self, parent, how):
        if how == 'bare':
            # Python itself may hang in the child if another thread is busy.
            self.wait_idle([parent])
        child = self.fork(parent, how)
        if how in AFRESH:
            child.ask('open')
        return child

    def _check_children(self, parent, subscriber, hows):
        """Children come, emit, and go in all ways; respawned, too."""
        total = subscriber.total
        for how in hows:
            for number, end in enumerate(ENDS + ('_exit', 'SIGTERM')):
                parent.ask('emit', count=5)
                child = self._fork(parent, how)
                child.tell('emit', count=10, threads=2)
                parent.ask('emit', count=5)
                child.answer()
                total += 30
                self.assert_complete(subscriber, total)
                if end in ENDS:
                    child.tell('leave', how=end, count=7)
                    total += 7
                elif end == '_exit':
                    child.tell('leave', how=end)
                else:
                    child.kill(signal.SIGTERM)
                parent.ask('reap', pid=child.pid)
                self.assert_complete(subscriber, total)
                if how == 'spawn' and number == 1:
                    break   # takes as long as a start
        self.assertFalse(subscriber.ended.is_set())

    def test_children_of_the_leader(self):
        parent, subscriber = self._start(leads=True)
        parent.ask('emit', count=10)
        self.assert_complete(subscriber, 10)
        self._check_children(parent, subscriber, ('bare', *HOW))

    def test_children_of_a_follower(self):
        parent, subscriber = self._start(leads=False)
        parent.ask('emit', count=10)
        self.assert_complete(subscriber, 10)
        self._check_children(parent, subscriber, ('fork',))

    def test_forked_before_anything_was_emitted(self):
        parent, subscriber = self._start(leads=True)
        children = [self._fork(parent, how) for how in HOW]
        for child in children:
            child.ask('emit', count=10)
        self.assert_complete(subscriber, 10 * len(HOW))
        parent.ask('emit', count=10)
        self.assert_complete(subscriber, 10 * len(HOW) + 10)

    def test_child_of_a_child(self):
        parent, subscriber = self._start(leads=True)
        child = self.fork(parent, 'fork')
        grandchild = self.fork(child, 'fork')
        for process in (grandchild, parent, child):
            process.ask('emit', count=10)
        self.assert_complete(subscriber, 30)

    def test_child_with_its_parents_pid(self):
        """As process 1 of a container that process 1 of another has made."""
        nursery = self.publisher(is_open=False)
        try:
            parent = self.fork(nursery, 'namespace')
        except AssertionError as error:
            self.skipTest('no pid namespaces: %s' % error)
        parent.ask('open')
        subscriber = self.subscribe()
        child = self.fork(parent, 'namespace')
        self.assertEqual([1, 1], [each.ask('pid') for each in (parent, child)])
        # Each by a name of its own, which has no pid.
        child.ask('start', pause=0.01)
        parent.ask('emit', count=10)
        total = child.ask('stop') + 10
        self.assert_complete(subscriber, total)
        child.tell('leave', how='exit')
        parent.ask('reap', pid=child.pid)
        parent.ask('emit', count=10)
        self.assert_complete(subscriber, total + 10)

    def test_workers_of_cotyledon(self):
        """Forked or, as of Python 3.14, by a fork server."""
        if importlib.util.find_spec('cotyledon') is None:
            self.skipTest('cotyledon is not installed')
        master, subscriber = self._start(leads=True)
        control = os.path.join(self.directory, 'control')
        with socket.socket(socket.AF_UNIX) as listener:
            listener.settimeout(base.PATIENCE)
            listener.bind(control)
            listener.listen(2)
            master.tell('be_master', workers=2, control=control)
            workers = [self._worker(listener) for _ in range(2)]
        for number, worker in enumerate(workers, 1):
            worker.ask('emit', count=10)
            self.assert_complete(subscriber, number * 10)
        forked = multiprocessing.get_start_method() == 'fork'
        self.assertEqual(
            {'test.%d' % (master if forked else worker).pid
             for worker in workers},
            {message['publisher_id'] for message in subscriber.messages})
        master.kill(signal.SIGTERM)
        # Their last words, by os._exit() as followers.
        subscriber.wait_end()
        self.assert_complete(subscriber, 2 * (10 + 5))
        self.assertEqual(0, master.wait_exit())

    def _worker(self, listener):
        worker = base.Child(0, listener.accept()[0])
        self.addCleanup(worker.close)
        worker.pid = worker.ask('pid')
        return worker

    def test_forking_amid_notifications(self):
        parent, subscriber = self._start(leads=True,
                                         buffer_size=64 * base.MIB)
        descriptors = base.descriptors(parent.pid)
        # Spares the CPU, or forking would take too long.
        parent.ask('start', threads=2, pause=0.0005)
        for _ in range(100):
            child = self.fork(parent, 'fork')
            total = subscriber.total
            child.ask('emit', count=5)
            base.wait_until(
                lambda: any(message['payload']['source'] == '%d/0' % child.pid
                            and message['payload']['number'] >= 5
                            for message in subscriber.messages[total:]),
                'what the child has emitted')
            child.kill()
            parent.ask('reap', pid=child.pid)
            child.close()
        self.assert_complete(subscriber, parent.ask('stop') + 100 * 5)
        base.wait_until(
            lambda: base.descriptors(parent.pid) <= descriptors + 2,
            lambda: '%d descriptors, as at first' % descriptors)

    def test_child_never_emits_what_waits_in_its_parent(self):
        leader, follower = self.start_workers(2)
        subscriber = self.subscribe()
        follower.ask('emit', count=1)
        self.assert_complete(subscriber, 1)
        for round_ in range(1, 6):
            base.stop(leader.pid)
            follower.ask('emit', count=1500, size=200)
            child = self.fork(follower, 'fork')
            child.ask('emit', count=10)
            child.tell('leave', how='exit', count=1)
            # Its last words have a second, and the leader has to take them.
            leader.kill(signal.SIGCONT)
            follower.ask('reap', pid=child.pid)
            subscriber.wait(1 + round_ * 1511)
        self.assert_complete(subscriber, 1 + 5 * 1511)

    def test_fork_right_after_the_start(self):
        """The loop has just begun to open its files."""
        self.parent = self.publisher(is_open=False)
        self.parent.ask('load')
        for number in range(40):
            # The first leads, the second follows.
            worker = self.worker(is_open=False)
            other = self.worker(is_open=False)
            for process in (worker, other):
                child = self.fork(process, 'fork', 'open_and_fork',
                                  pause=number % 20 * 5e-5)
                self.assertEqual([], self._inherited(child, process))
                child.close()
            self.kill_worker(worker)
            self.kill_worker(other)
            process.close()
            worker.close()

    def _inherited(self, child, parent):
        """What the child has open of its parent's, and should not."""
        child.ask('emitted')    # when it answers it is in place
        shared = set(base.open_files(child.pid)).intersection(
            base.open_files(parent.pid))
        sockets = {name for name in shared if name.startswith('socket:')}
        # By one of these the parent gets its commands.
        return [] if len(sockets) == 1 and not any(
            name.endswith('.lock') for name in shared) else sorted(shared)

    def test_parent_is_killed_and_its_child_lives(self):
        """What the child has inherited keeps nobody from leading."""
        self.parent = self.publisher(is_open=False)
        self.parent.ask('load')
        for _ in range(20):
            worker = self.worker()
            self.wait_leader([worker])
            child = self.fork(worker, 'fork')
            self.kill_worker(worker)
            other = self.worker()
            self.wait_leader([other])
            subscriber = self.subscribe()
            for process in (child, other):
                process.ask('emit', count=2)
            self.assert_complete(subscriber, 4)
            child.kill()
            self.kill_worker(other)

    # Last words.

    def test_last_words_of_a_fresh_child(self):
        parent, subscriber = self._start(leads=True)
        total = 0
        for how in HOW:
            for end in ENDS if how != 'spawn' else ('return',):
                child = self._fork(parent, how)
                child.tell('leave', how=end, count=20)
                parent.ask('reap', pid=child.pid)
                total += 20
                self.assert_complete(subscriber, total)

    def test_first_words_of_a_child_in_its_exit_handler(self):
        """When no thread can be started any more, as of Python 3.12."""
        parent, subscriber = self._start(leads=True)
        for number in range(1, 4):
            child = self.fork(parent, 'fork')
            child.ask('emit_at_exit', count=20)
            child.tell('leave', how='exit')
            parent.ask('reap', pid=child.pid)
            self.assert_complete(subscriber, 20 * number)

    def test_child_that_is_terminated_in_good_order(self):
        parent, subscriber = self._start(leads=True)
        for number in range(1, 4):
            child = self.fork(parent, 'fork')
            child.ask('handle_sigterm')
            child.ask('emit', count=20)
            child.kill(signal.SIGTERM)
            parent.ask('reap', pid=child.pid)
            self.assert_complete(subscriber, 20 * number)
