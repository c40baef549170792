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

"""The path outlives the process that serves it.

Guards against a change of the leader, or a path that was tampered with, that
costs more than the end of a connection: nobody would serve the path for
long, a subscriber would hang or miss what is emitted after it connected, a
notification would come twice, be lost though it was handed over in time, or
two processes would each believe to be the leader.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import threading
import time

import base

# Seconds within which there is a leader again.
SOON = 1


class Reader:

    """A subscriber that reconnects at once, and notes what it got.

    Each connection is an account of its own.
    """

    def __init__(self, path):
        self.path = path
        self.accounts = []
        self.connects = []      # when
        self.stopping = threading.Event()
        self.sock = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        while not self.stopping.is_set():
            with socket.socket(socket.AF_UNIX) as self.sock:
                try:
                    self.sock.connect(self.path)
                except OSError:
                    self.stopping.wait(0.001)
                    continue
                account = base.Account()
                self.accounts.append(account)
                self.connects.append(time.monotonic())
                with contextlib.suppress(OSError):
                    while data := self.sock.recv(base.MIB):
                        account.feed(data)

    def close(self):
        self.stopping.set()
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.thread.join(base.PATIENCE)


class Hoarder(base.SocketSubscriber):

    """Reads now and checks later.

    To be no slower than several processes write, all of them busy.
    """

    def __init__(self, path):
        self.hoard = []
        self.lines = 0
        super().__init__(path)

    def feed(self, data):
        self.hoard.append(data)
        self.lines += data.count(b'\n')

    def check(self):
        while self.hoard:
            super().feed(self.hoard.pop(0))


class HandoverTest(base.RelayTestCase):

    def _reader(self):
        reader = Reader(self.path)
        self.addCleanup(self._check_reader, reader)
        self.addCleanup(reader.close)
        return reader

    def _check_reader(self, reader):
        for account in reader.accounts:
            self.assertEqual([], account.problems)
        ids = [message['message_id'] for account in reader.accounts
               for message in account.messages]
        self.assertEqual(len(ids), len(set(ids)), 'some came twice')

    def _emit_all(self, workers, account):
        """Have all emit one; each has to arrive."""
        expected = {}
        for worker in workers:
            expected['%d/0' % worker.pid] = worker.ask('emit', count=1)
        self._wait_sources(account, set(expected))

    def _wait_sources(self, account, sources):
        """Wait for a notification of each source; nothing else is lost."""
        def missing():
            return sources - {
                message['payload'].get('source')
                for message in list(account.messages)}

        base.wait_until(lambda: not missing(),
                        lambda: 'notifications of %s' % missing())

    def _subscribe_to_next(self, workers):
        """Connect once one of them has taken over: see base.wait_heir()."""
        self.wait_leader(workers)
        return self.subscribe()

    # Killed.

    def test_leader_killed_over_and_over_under_load(self):
        workers = self.start_workers(4)
        reader = self._reader()
        for worker in workers:
            worker.ask('start', pause=0.001)
        base.wait_until(lambda: reader.accounts and
                        reader.accounts[-1].received, 'the reader is served')
        descriptors = {}
        for _ in range(40):
            leader = self.wait_leader(workers)
            # The reader is there; so it gets what each emits from now on.
            account = reader.accounts[-1]
            connects = len(reader.accounts)
            self._emit_all(workers, account)
            for worker in workers:
                descriptors[worker.pid] = base.descriptors(worker.pid)
            workers.remove(leader)
            killed = time.monotonic()
            self.kill_worker(leader)
            base.wait_until(
                lambda: len(reader.accounts) > connects
                and reader.accounts[-1].received,
                lambda: 'served again: %s' % reader.connects[-2:])
            self.assertLess(time.monotonic() - killed, SOON)
            workers.append(self.worker())
            workers[-1].ask('start', pause=0.001)
        # One for each follower, and a few more.
        self.assertLess(max(descriptors.values()), 40)

    def test_who_waits_at_a_leader_that_is_killed(self):
        """It sees the end of the stream, for what was taken in is lost."""
        workers = self.start_workers(3)
        for _ in range(15):
            leader = self.wait_leader(workers)
            followers = [each for each in workers if each is not leader]
            # Each has to have met the leader, or there is no handing over.
            with contextlib.closing(self.subscribe()) as subscriber:
                self._emit_all(followers, subscriber)
            base.stop(leader.pid)
            waiting = [self.subscribe() for _ in range(5)]
            for follower in followers:
                follower.ask('emit', count=10)
            self.wait_idle(followers)
            self.kill_worker(leader)
            for subscriber in waiting:
                subscriber.wait_end()
                self.assertEqual(0, subscriber.total)
                subscriber.close()
            with contextlib.closing(
                    self._subscribe_to_next(followers)) as subscriber:
                self._emit_all(followers, subscriber)
            workers = followers + [self.worker()]

    def test_mode_changed_by_hand_before(self):
        """It is the same socket, whatever its mode, and no other's."""
        workers = self.start_workers(4)
        for mode in (0o666, 0o600, 0o640):
            with contextlib.closing(self.subscribe()) as subscriber:
                self._emit_all(workers, subscriber)
            os.chmod(self.path, mode)
            inode = os.stat(self.path).st_ino
            leader = self.wait_leader(workers)
            workers.remove(leader)
            self.kill_worker(leader)
            subscriber = self._subscribe_to_next(workers)
            self._emit_all(workers, subscriber)
            self.assertEqual(inode, os.stat(self.path).st_ino)
            subscriber.close()
            workers.append(self.worker())

    def test_follower_out_of_descriptors(self):
        """It cannot follow the next leader; what it loses is told."""
        workers = self.start_workers(3)
        with contextlib.closing(self.subscribe()) as subscriber:
            self._emit_all(workers, subscriber)
        leader = self.wait_leader(workers)
        workers.remove(leader)
        poor, other = workers
        poor.ask('limit_descriptors', number=base.descriptors(poor.pid) + 2)
        poor.ask('exhaust')
        base.stop(poor.pid)      # or it might lead
        self.kill_worker(leader)
        subscriber = self._subscribe_to_next([other])
        self._emit_all([other], subscriber)
        poor.kill(signal.SIGCONT)
        for _ in range(10):
            poor.ask('exhaust')     # what the end of its uplink gave back
            poor.ask('emit', count=10)
        # With one left it connects, and cannot take what the leader passes.
        self.assertRegex(self.parent.wait_log('; trying again'),
                         'Too many open files|no answer from the leader')
        poor.ask('emit', count=100)
        poor.ask('release')
        self.assert_accounted(subscriber, 201)

    def test_waiting_subscribers_do_not_hang_if_the_path_was_taken(self):
        workers = self.start_workers(3)
        with contextlib.closing(self.subscribe()) as subscriber:
            self._emit_all(workers, subscriber)
        leader = self.wait_leader(workers)
        base.stop(leader.pid)
        waiting = [self.subscribe() for _ in range(5)]
        os.unlink(self.path)
        self.kill_worker(leader)
        workers.remove(leader)
        for subscriber in waiting:
            subscriber.wait_end()
        subscriber = self.subscribe()
        self._emit_all(workers, subscriber)

    def test_follower_stopped_and_leader_killed(self):
        workers = self.start_workers(4)
        for number in range(20):
            with contextlib.closing(self.subscribe()) as subscriber:
                self._emit_all(workers, subscriber)
            leader = self.wait_leader(workers)
            stopped, *others = [each for each in workers
                                if each is not leader]
            cut = self.subscribe()
            self._emit_all(workers, cut)
            stopped.ask('hurry', interval=1)
            if number % 2:
                # The last that it has heard of the leader: nobody is there.
                cut.close()
                self.wait_idle([leader])
                stopped.ask('emit', count=1)
                self.wait_idle([leader, stopped])
            base.stop(stopped.pid)
            begin = time.monotonic()
            self.kill_worker(leader)
            cut.wait_end()
            subscriber = self._subscribe_to_next(others)
            self._emit_all(others, subscriber)
            self.assertLess(time.monotonic() - begin, SOON)
            # It emits before it has noticed anything, every other time: by
            # the thread that the GIL was given to first.
            stopped.tell('emit', count=1)
            stopped.kill(signal.SIGCONT)
            stopped.answer()
            stopped.ask('hurry', interval=0.005)
            self._wait_sources(subscriber, {'%d/0' % stopped.pid})
            self.assertEqual(0, subscriber.lost)
            cut.close()
            subscriber.close()
            workers = [stopped, *others, self.worker()]

    def test_all_but_one_killed_at_once(self):
        workers = self.start_workers(5)
        for _ in range(10):
            with contextlib.closing(self.subscribe()) as subscriber:
                self._emit_all(workers, subscriber)
            leader = self.wait_leader(workers)
            last = next(each for each in workers if each is not leader)
            workers.remove(last)
            for worker in workers:
                worker.kill()
            # A killed leader takes along what it was sent before it ended.
            for worker in workers:
                self.parent.ask('reap', pid=worker.pid)
            with contextlib.closing(
                    self._subscribe_to_next([last])) as subscriber:
                self._emit_all([last], subscriber)
            workers = [last] + [self.worker() for _ in range(4)]

    # In good order.

    def _hoarder(self):
        hoarder = Hoarder(self.path)
        self.addCleanup(hoarder.close)
        hoarder.go()
        return hoarder

    def test_leader_leaves_while_followers_emit(self):
        """Who reads notices nothing of it, half a dozen in a row."""
        workers = self.start_workers(4, buffer_size=256 * base.MIB)
        reader = self._hoarder()
        for number in range(6):
            for worker in workers:
                worker.ask('start', threads=2, pause=0.0002 * (number % 3))
            lines = reader.lines
            base.wait_until(lambda: reader.lines > lines + 200, 'a stream')
            leader = self.wait_leader(workers)
            workers.remove(leader)
            leader.ask('stop')
            leader.tell('leave', count=5)
            self.wait_leader(workers)
            self.parent.ask('reap', pid=leader.pid)
            for worker in workers:
                worker.ask('stop')
            heir = 'the leader, pid %d,' % self.leader_pid()
            base.wait_until(lambda: self.parent.log(heir), 'it is followed')
            workers.append(self.worker())
        emitted = sum(worker.ask('emitted') for worker in workers)
        with contextlib.closing(self.subscribe()) as subscriber:
            self._emit_all(workers, subscriber)
        reader.close()
        reader.check()
        self.assertEqual(([], 0), (reader.problems, reader.lost))
        numbers = self._numbers(reader)
        for source, each in numbers.items():
            self.assertEqual(list(range(1, len(each) + 1)), each, source)
        here = ['%d/' % worker.pid for worker in workers]
        self.assertEqual(emitted + len(workers), sum(
            len(each) for source, each in numbers.items()
            if source.startswith(tuple(here))))
        for source, each in numbers.items():
            if source.endswith('/0') and not source.startswith(tuple(here)):
                self.assertEqual(5, len(each))

    def test_leader_leaves_as_all_others_are_stopped(self):
        leader, *followers = self.start_workers(3)
        subscriber = self.subscribe()
        self._emit_all([leader, *followers], subscriber)
        for each in followers:
            base.stop(each.pid)
        leader.tell('leave', count=5)
        self.parent.ask('reap', pid=leader.pid)
        self.assertLess(self.parent.exit_seconds(leader.pid), 1)
        subscriber.wait_end()
        self.assert_complete(subscriber, 8)
        for each in followers:
            each.kill(signal.SIGCONT)
        with contextlib.closing(self._subscribe_to_next(followers)) as late:
            self._emit_all(followers, late)

    def _numbers(self, account):
        numbers = {}
        for message in account.messages:
            payload = message['payload']
            numbers.setdefault(payload['source'], []).append(
                payload['number'])
        return numbers

    def test_followers_leave_at_once(self):
        leader, *followers = self.start_workers(6)
        subscriber = self.subscribe()
        self._emit_all(followers, subscriber)
        for worker in followers:
            worker.tell('leave', count=200)
        self.assert_complete(subscriber, 5 * 201)

    def test_all_leave_at_once(self):
        """They lead one by one, each for a moment."""
        workers = self.start_workers(6)
        with contextlib.closing(self.subscribe()) as subscriber:
            self._emit_all(workers, subscriber)
        reader = self._reader()
        base.wait_until(lambda: reader.accounts, 'the reader is there')
        for worker in workers:
            worker.tell('leave', count=50)
        for worker in workers:
            self.assertEqual(0, self.parent.ask('reap', pid=worker.pid))
        took = [float(line.split()[-2])
                for line in self.parent.log('exit handlers of')]
        self.assertLess(max(took), 1.5)
        # The first at least had somebody to send it to.
        self.assertGreaterEqual(reader.accounts[0].received, 50)
        late = self.worker()
        with contextlib.closing(self.subscribe()) as subscriber:
            self._emit_all([late], subscriber)

    # Tampered with.

    def _is_locked(self):
        with open(self.path + '.lock') as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True

    def _assert_one_leads(self, workers):
        """Whoever connects hears all; one holds the lock."""
        def settled():
            with contextlib.closing(base.SocketSubscriber(
                    self.path)) as subscriber:
                subscriber.go()
                for worker in workers:
                    worker.ask('emit', count=1)
                end = time.monotonic() + 0.3
                while time.monotonic() < end:
                    if len(self._numbers(subscriber)) == len(workers):
                        # A leader that lost its lock is still followed.
                        return self._is_locked()
                    time.sleep(0.01)

        base.wait_until(settled, 'all are heard, and one holds the lock')
        self.wait_leader(workers)
        # Once settled, it stays so.
        with contextlib.closing(self.subscribe()) as subscriber:
            for _ in range(3):
                self._emit_all(workers, subscriber)

    def test_leader_replaced_while_followers_emit(self):
        """What it has taken in does not come after what came later."""
        leader, follower = self.start_workers(2)
        before = self.subscribe()
        self._emit_all([leader, follower], before)
        follower.ask('start', pause=0.001)
        for _ in range(5):
            base.stop(leader.pid)
            for suffix in ('.lock', '.relay', ''):
                os.unlink(self.path + suffix)
            other = self.worker()
            self.wait_leader([other])
            after = self.subscribe()
            # When it is due to look after the path, as it goes on.
            self.assert_never(before.ended.is_set, 'ended', 1)
            leader.kill(signal.SIGCONT)
            before.wait_end()
            source = '%d/1' % follower.pid
            self._wait_sources(after, {source})
            last = self._numbers(before)[source][-1]
            first = self._numbers(after)[source][0]
            # Beside a subscriber that is slow to read, a gap is possible.
            self.assertLess(last, first)
            base.wait_until(lambda: after.reasons, 'the loss is told')
            self.assertEqual(['leader replaced'], after.reasons)
            leader, before = other, after
        follower.ask('stop')

    def test_lock_removed_and_a_start_before_the_leader_looks(self):
        """The lock is free, the path is not: there is whom to follow."""
        leader, = self.start_workers(1)
        subscriber = self.subscribe()
        self._emit_all([leader], subscriber)
        base.stop(leader.pid)
        os.unlink(self.path + '.lock')
        newcomer = self.worker()
        newcomer.ask('emit', count=10)
        # It has taken the lock, and has given it back.
        base.wait_until(lambda: os.path.exists(self.path + '.lock'),
                        'the newcomer has tried to lead')
        self.wait_idle([newcomer])
        newcomer.ask('emit', count=10)
        leader.kill(signal.SIGCONT)
        self.assert_complete(subscriber, 21)

    def _relay_listens(self):
        with socket.socket(socket.AF_UNIX) as probe:
            return not probe.connect_ex(self.path + '.relay')

    def test_lock_removed_and_a_follower_goes_on_that_missed_a_leader(self):
        """It has the same listener as the leader, who has no lock."""
        leader, other, stopped = self.start_workers(3)
        with contextlib.closing(self.subscribe()) as subscriber:
            self._emit_all([leader, other, stopped], subscriber)
        base.stop(stopped.pid)
        self.kill_worker(leader)
        self.wait_leader([other])
        # Which who takes the lock would clear away before it listens.
        base.wait_until(self._relay_listens, 'the relay is served')
        os.unlink(self.path + '.lock')
        stopped.kill(signal.SIGCONT)
        other.ask('start', pause=0.01)      # or it would not look
        self.wait_leader([other])
        other.ask('stop')
        self._assert_one_leads([other, stopped])

    def test_lock_removed_and_then_a_second_start(self):
        first, = self.start_workers(1)
        workers = [first]
        for _ in range(5):
            os.unlink(self.path + '.lock')
            workers.append(self.worker())
            self._assert_one_leads(workers)

    def test_directory_removed_and_then_a_second_start(self):
        workers = self.start_workers(2)
        for _ in range(3):
            shutil.rmtree(os.path.dirname(self.path))
            os.mkdir(os.path.dirname(self.path))
            workers.append(self.worker())
            self._assert_one_leads(workers)

    def test_directory_removed_for_a_while(self):
        workers = self.start_workers(3)
        shutil.rmtree(os.path.dirname(self.path))
        for worker in workers:
            worker.ask('start', pause=0.01)
        self.parent.wait_log('No such file')
        os.mkdir(os.path.dirname(self.path))
        base.wait_until(lambda: os.path.exists(self.path), 'path is served')
        for worker in workers:
            worker.ask('stop')
        self._assert_one_leads(workers)

    def test_socket_removed_while_followers_emit(self):
        leader, *followers = self.start_workers(3)
        with contextlib.closing(self.subscribe()) as early:
            self._emit_all([leader] + followers, early)
            followers[0].ask('start', pause=0.01)
            for somebody in (True, False):
                os.unlink(self.path)
                subscriber = self.subscribe()   # which waits for it
                self._emit_all(followers, subscriber)
                subscriber.close()
                if somebody:
                    # Who is connected stays so.
                    self._emit_all([leader] + followers, early)
                    self.assertFalse(early.ended.is_set())
                    early.close()
        followers[0].ask('stop')

    def test_relay_removed_while_followers_emit(self):
        leader, follower = self.start_workers(2)
        with contextlib.closing(self.subscribe()) as subscriber:
            self._emit_all([leader, follower], subscriber)
        follower.ask('start', pause=0.01)
        os.unlink(self.path + '.relay')
        newcomer = self.worker()
        newcomer.ask('start', pause=0.01)
        base.wait_until(lambda: os.path.exists(self.path + '.relay'),
                        'the relay is served')
        follower.ask('stop')
        newcomer.ask('stop')
        self._assert_one_leads([leader, follower, newcomer])
