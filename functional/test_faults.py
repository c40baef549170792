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

"""Faults of the path, of subscribers and of the process, and recovery.

Guards against a service that does not come back once a fault is over, that
breaks what belongs to others, that spins or floods the log meanwhile, or
that lets one bad subscriber harm the rest: the path would not be served
within seconds, a file or socket of somebody else would be gone, CPU time or
lines of the log would pile up, or a healthy subscriber would miss something.
"""

import os
import re
import select
import signal
import socket
import stat
import time

import base


class PathTest(base.FunctionalTestCase):

    """The path cannot be served, and then it can."""

    def assert_not_served(self, seconds=0.5):
        def served():
            with socket.socket(socket.AF_UNIX) as sock:
                return not sock.connect_ex(self.path)

        self.assert_never(served, 'the path is served', seconds)

    def assert_heals(self, publisher):
        """Fail unless the path comes to be served, which the log tells."""
        subscriber = self.subscribe()
        last = publisher.ask('emitted') + 10
        publisher.ask('emit', count=10)
        base.wait_until(lambda: last in self._numbers(subscriber),
                        lambda: 'number %d at %s' % (last, subscriber))
        # What was kept in the first second may have come before.
        self.assertEqual(list(range(last - 9, last + 1)),
                         self._numbers(subscriber)[-10:])
        publisher.wait_log('all is well again')
        self.assertEqual(2, len(publisher.troubles()), publisher.troubles())

    def _numbers(self, subscriber):
        return [each['payload']['number'] for each in subscriber.messages]

    def test_missing_directory(self):
        directory = os.path.dirname(self.path)
        os.rmdir(directory)
        publisher = self.publisher()
        line = publisher.wait_log('WARNING')
        self.assertIn(self.path, line)
        publisher.ask('emit', count=10)     # works
        self.assert_not_served(0.1)
        os.mkdir(directory)
        self.assert_heals(publisher)

    def test_regular_file_in_the_way_is_kept(self):
        with open(self.path, 'w') as file:
            file.write('precious')
        publisher = self.publisher()
        line = publisher.wait_log('WARNING')
        self.assertIn(self.path, line)
        self.assertIn('not a socket', line)
        publisher.ask('emit', count=10)
        self.assert_not_served()
        with open(self.path) as file:
            self.assertEqual('precious', file.read())
        os.unlink(self.path)
        self.assert_heals(publisher)

    def test_live_socket_of_another_program_is_kept(self):
        with socket.socket(socket.AF_UNIX) as foreign:
            foreign.bind(self.path)
            foreign.listen(1)       # and its backlog may be full
            before = os.lstat(self.path)
            publisher = self.publisher()
            line = publisher.wait_log('WARNING')
            self.assertIn(self.path, line)
            self.assert_never(
                lambda: not os.path.samestat(before, os.lstat(self.path)),
                'the socket was replaced')
            # It is still the other program's.
            while select.select([foreign], [], [], 0)[0]:
                foreign.accept()[0].close()
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(self.path)
        self.assert_heals(publisher)

    def test_symlink_in_place_of_the_lock_is_not_followed(self):
        victim = os.path.join(self.directory, 'victim')
        lock = self.path + '.lock'
        for exists in (False, True):
            if exists:
                with open(victim, 'w') as file:
                    file.write('precious')
                os.chmod(victim, 0o644)
            os.symlink(victim, lock)
            publisher = self.publisher()
            self.assertIn(lock, publisher.wait_log('WARNING'))
            self.assert_not_served(0.2)
            self.assertEqual(exists, os.path.exists(victim))
            os.unlink(lock)
            self.assert_heals(publisher)
            publisher.close()
            os.unlink(lock)
        with open(victim) as file:
            self.assertEqual('precious', file.read())
        self.assertEqual(0o644, stat.S_IMODE(os.stat(victim).st_mode))

    def test_unknown_group_makes_no_socket(self):
        publisher = self.publisher(group='no-such-group')
        self.assertIn('no-such-group', publisher.wait_log('WARNING'))
        publisher.ask('emit', count=10)
        self.assert_not_served()
        self.assertEqual(1, len(publisher.troubles()))

    def test_group_that_is_no_number_of_a_group_makes_no_socket(self):
        # The first one means "leave it as it is" to chown().
        groups = ('4294967295', '4294967296', '-1')
        for publisher in self.publishers(*(
                {'group': group, 'path': self.path + group}
                for group in groups)):
            publisher.wait_log('sock_group')
        self.assert_never(
            lambda: any(os.path.exists(self.path + group)
                        for group in groups), 'a socket was made')

    def test_group_that_is_not_ours_makes_no_socket(self):
        if os.getuid() != 0:
            self.skipTest('needs root, to become a user without rights')
        os.chown(os.path.dirname(self.path), base.NOBODY, base.NOBODY)
        publisher = self.publisher(uid=base.NOBODY, group='0')
        self.assertIn(self.path, publisher.wait_log('WARNING'))
        publisher.ask('emit', count=10)
        self.assert_not_served()
        self.assertEqual(1, len(publisher.troubles()))

    def test_deleted_socket_comes_back_and_subscribers_stay(self):
        publisher = self.publisher()
        subscriber = self.subscribe()
        before = os.lstat(self.path)
        publisher.ask('emit', count=10)
        os.unlink(self.path)
        publisher.ask('start', pause=0.01)
        base.wait_until(lambda: os.path.exists(self.path), 'it is back')
        self.assertNotEqual(before.st_ctime_ns,
                            os.lstat(self.path).st_ctime_ns)
        other = self.subscribe()
        other.wait(10)
        self.assert_complete(subscriber, publisher.ask('stop'))
        self.assertEqual(2, len(publisher.log('served')))

    def test_deleted_socket_comes_back_with_nobody_connected(self):
        publisher = self.publisher()
        publisher.wait_log('served')
        os.unlink(self.path)
        publisher.ask('start', pause=0.01)
        subscriber = self.subscribe()
        subscriber.wait(10)
        self.assertEqual(0, subscriber.lost)

    def test_deleted_lock_comes_back(self):
        publisher = self.publisher()
        subscriber = self.subscribe()
        os.unlink(self.path + '.lock')
        publisher.ask('start', pause=0.01)
        base.wait_until(lambda: os.path.exists(self.path + '.lock'),
                        'it is back')
        # A second process finds it held, and leaves the path alone.
        before = os.lstat(self.path)
        second = self.publisher()
        second.wait_log(str(publisher.pid))
        self.assertTrue(os.path.samestat(before, os.lstat(self.path)))
        self.assert_complete(subscriber, publisher.ask('stop'))

    def test_deleted_directory_comes_back(self):
        publisher = self.publisher()
        subscriber = self.subscribe()
        directory = os.path.dirname(self.path)
        os.rename(directory, directory + '.old')
        publisher.ask('start', pause=0.01)
        publisher.wait_log('WARNING')
        os.mkdir(directory)
        other = self.subscribe()
        other.wait(10)
        self.assert_complete(subscriber, publisher.ask('stop'))
        self.assertEqual(2, len(publisher.troubles()), publisher.troubles())

    def test_log_that_is_set_up_late_tells_who_serves_and_what_is_wrong(self):
        publishers = [self.publisher(), self.publisher(), self.publisher(
            path=os.path.join(self.directory, 'none', 's'))]
        texts = ('served with mode', 'relayed to the leader', 'trying again')
        for publisher, text in zip(publishers, texts):
            publisher.wait_log(text)
            publisher.ask('log_to', path=os.path.join(
                self.directory, text[:6]))

        def told():
            for publisher, text in zip(publishers, texts):
                publisher.ask('emit', count=1)
                with open(os.path.join(self.directory, text[:6])) as log:
                    if not re.search(text + '.* since 20', log.read()):
                        return False
            return True

        base.wait_until(told, 'all three are told again')

    def test_without_a_path_the_service_runs_on(self):
        publisher = self.publisher(path='', tracebacks=True)
        self.assertIn('sock_path', ' '.join(publisher.log()))
        publisher.ask('emit', count=10)
        publisher.tell('leave')
        self.assertEqual(0, publisher.wait_exit())


class SecondProcessTest(base.FunctionalTestCase):

    """A process owns the path, or did until it was killed."""

    def test_path_that_is_held_is_taken_over_when_its_owner_is_killed(self):
        first = self.publisher()
        subscriber = self.subscribe()
        before = os.lstat(self.path)
        second = self.publisher()
        second.wait_log(str(first.pid))     # names the owner
        second.ask('emit', count=10)
        first.ask('emit', count=10)
        self.assert_complete(subscriber, 20)
        self.assert_never(
            lambda: not os.path.samestat(before, os.lstat(self.path)),
            'the socket was replaced')
        self.assertEqual(1, len(second.log(str(first.pid))))
        first.kill()
        subscriber.wait_end()
        heir = self._subscribe_to(second)
        second.ask('emit', count=10)
        self.assert_complete(heir, 10)
        self.assertEqual([], first.troubles())

    def _subscribe_to(self, publisher):
        """Connect, as soon as this one serves the path."""
        publisher.wait_log('served')
        return self.subscribe()

    def test_eight_processes_that_start_at_once_make_one_owner(self):
        left = set(self.publishers(*({} for _ in range(8))))
        while left:
            owner = base.wait_until(
                lambda: [each for each in left if each.log('served')],
                'one serves')
            self.assertEqual(1, len(owner))
            subscriber = self.subscribe()
            owner[0].ask('emit', count=1)
            subscriber.wait(1)
            owner[0].kill()
            subscriber.wait_end()
            left -= set(owner)

    def test_killed_and_started_again_on_the_stale_path(self):
        for _ in range(2):
            publisher = self.publisher()
            subscriber = self.subscribe()
            publisher.ask('emit', count=10)
            self.assert_complete(subscriber, 10)
            self.assertEqual([], publisher.troubles())
            publisher.kill()
            publisher.wait_exit()
            subscriber.wait_end()
            self.assertTrue(os.path.exists(self.path))

    def _kill_but_for_a_child(self, **kwargs):
        publisher = self.publisher()
        publisher.wait_log('served')
        child = publisher.ask('fork_without_hooks', **kwargs)
        publisher.kill()
        publisher.wait_exit()
        # It lies: nobody will ever accept.
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(self.path)
        return publisher, child

    def test_killed_while_a_child_still_holds_the_listener(self):
        self._kill_but_for_a_child(keep_lock=False)
        second = self.publisher()
        subscriber = self._subscribe_to(second)
        second.ask('emit', count=10)
        self.assert_complete(subscriber, 10)
        self.assertEqual([], second.troubles())

    def test_killed_while_a_child_still_holds_everything(self):
        first, child = self._kill_but_for_a_child(keep_lock=True)
        second = self.publisher()
        # Nothing can be done, but to say so.
        self.assertIn(str(first.pid), second.wait_log('WARNING'))
        os.kill(child, signal.SIGKILL)
        subscriber = self._subscribe_to(second)
        second.ask('emit', count=10)
        self.assert_complete(subscriber, 10)


class SubscriberTest(base.FunctionalTestCase):

    """Subscribers that do what they should not."""

    def test_one_more_than_allowed_is_told_why(self):
        publisher = self.publisher(max_subscribers=3)
        allowed = [self.subscribe() for _ in range(3)]
        for _ in range(3):
            refused = self.subscribe()
            refused.wait_end()
            self.assertIn('sock_max_subscribers', refused.refused)
        publisher.ask('emit', count=10)
        for subscriber in allowed:
            self.assert_complete(subscriber, 10)
        # A place is free again, as soon as the service knows.
        allowed.pop().close()
        publisher.wait_log('parted')
        allowed.append(self.subscribe())
        publisher.ask('emit', count=10)
        self.assert_complete(allowed[0], 20)
        self.assert_complete(allowed[2], 10)

    def test_half_closed_subscriber_that_is_gone_gives_its_place(self):
        publisher = self.publisher(max_subscribers=2)
        self.subscribe()
        gone = self.subscribe()
        gone.sock.shutdown(socket.SHUT_WR)
        publisher.ask('emit', count=1)
        self.assert_complete(gone, 1)
        gone.close()
        subscriber = self.subscribe()
        publisher.ask('emit', count=1)
        self.assert_complete(subscriber, 1)

    def test_half_closed_subscriber_stays_until_it_is_gone(self):
        publisher = self.publisher()
        healthy = self.subscribe()
        subscriber = self.subscribe()
        subscriber.sock.shutdown(socket.SHUT_WR)
        publisher.ask('emit', count=10)
        self.assert_complete(subscriber, 10)
        self.assertFalse(subscriber.ended.is_set())
        # Only sending can tell that it is.
        subscriber.close()
        publisher.ask('emit', count=10)
        self.assert_complete(healthy, 20)
        publisher.wait_log('parted')
        self.assertEqual([], publisher.troubles())

    def test_subscriber_that_vanishes_within_a_line(self):
        publisher = self.publisher()
        healthy = self.subscribe()
        for number in range(1, 21):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(self.path)
                publisher.ask('emit', count=1, size=base.MIB)
                sock.recv(1000 * number)
            # Now it has gone, and what it had not read with it.
            self.assert_complete(healthy, number)
        base.wait_until(lambda: publisher.visits('parted') == 20,
                        'all are known to be gone')
        publisher.ask('emit', count=1)
        self.assert_complete(healthy, 21)
        self.assertEqual([], publisher.troubles())

    def test_killed_subscriber(self):
        publisher = self.publisher()
        healthy = self.subscribe()
        client = self.cat(publisher)
        client.stop()
        publisher.ask('emit', count=1000, size=1000)
        os.kill(client.pid, signal.SIGKILL)
        publisher.wait_log('parted: pid %d,' % client.pid)
        self.assert_complete(healthy, 1000)

    def test_subscriber_that_talks(self):
        publisher = self.publisher()
        healthy = self.subscribe()
        modest = self.subscribe()
        modest.sock.sendall(os.urandom(60000))
        talker = self.subscribe()
        with self.assertRaisesRegex(OSError, '.'):
            for _ in range(1000):
                talker.sock.sendall(os.urandom(65536))
        talker.wait_end()
        publisher.ask('emit', count=10)
        self.assert_complete(healthy, 10)
        self.assert_complete(modest, 10)
        base.wait_until(lambda: publisher.visits('parted'), 'it is logged')
        self.assertEqual(1, publisher.visits('parted'))

    def test_twelve_mebibytes(self):
        publisher = self.publisher()
        healthy = self.subscribe()
        slow = self.subscribe(go=False)
        # More than the kernel holds for the slow one.
        publisher.ask('emit', count=500, size=1000)
        self.assert_complete(healthy, 500)
        publisher.ask('emit', count=1, size=12 * base.MIB)
        self.assert_complete(healthy, 501)
        # Larger than the buffer, and yet it is the newest that is kept.
        slow.go()
        self.assert_accounted(slow, 501)
        self.assertEqual(501, slow.messages[-1]['payload']['number'])
        publisher.ask('emit', count=4, size=12 * base.MIB)
        publisher.ask('emit', count=1)
        self.assert_accounted(healthy, 506)
        self.assert_accounted(slow, 506)


class ProcessTest(base.FunctionalTestCase):

    """The process has no descriptors left, or very many threads."""

    def assert_does_not_spin(self, publisher, seconds=0.5):
        before = base.cpu_seconds(publisher.pid)
        time.sleep(seconds)
        self.assertLess(base.cpu_seconds(publisher.pid) - before,
                        0.2 * seconds)

    def _recover(self, publisher):
        """A subscriber that gets in, after some that may be refused."""
        def accepted():
            subscriber = self.subscribe()
            base.wait_until(
                lambda: subscriber.ended.is_set() or subscriber.total,
                'an answer for %s' % subscriber)
            return not subscriber.ended.is_set() and subscriber

        publisher.ask('start', pause=0.005)
        subscriber = base.wait_until(accepted, 'one is accepted again')
        publisher.ask('stop')
        publisher.wait_log('accepted again')
        return subscriber

    def test_out_of_descriptors(self):
        publisher = self.publisher()
        early = self.subscribe()
        publisher.wait_log('connected')
        publisher.ask('limit_descriptors', number=100)
        publisher.ask('exhaust')
        for _ in range(20):
            refused = self.subscribe()
            refused.wait_end()
            self.assertIn('descriptors', refused.refused)
        self.assert_does_not_spin(publisher)
        publisher.ask('emit', count=10)
        self.assert_complete(early, 10)
        publisher.ask('release')
        subscriber = self.subscribe()
        publisher.ask('emit', count=10)
        self.assert_complete(subscriber, 10)
        self.assert_complete(early, 20)
        publisher.wait_log('accepted again')
        self.assertEqual(2, len(publisher.troubles()), publisher.troubles())

    def test_out_of_descriptors_even_to_refuse_with(self):
        publisher = self.publisher()
        early = self.subscribe()
        publisher.ask('emit', count=10)
        self.assert_complete(early, 10)
        # The one in reserve is beyond the limit, too.
        publisher.ask('limit_descriptors', number=3)
        waiting = [self.subscribe() for _ in range(5)]
        publisher.wait_log('WARNING')
        self.assert_does_not_spin(publisher)
        publisher.ask('emit', count=10)
        self.assert_complete(early, 20)
        publisher.ask('limit_descriptors', number=1000)
        for subscriber in waiting:
            subscriber.wait_end()
            self.assertIn('descriptors', subscriber.refused)
        self._recover(publisher)
        self.assertEqual(2, len(publisher.troubles()), publisher.troubles())

    def test_forty_threads_and_nobody_there(self):
        # So large that forty threads do not outrun the loop meanwhile.
        publisher = self.publisher(buffer_size=256 * base.MIB)
        publisher.wait_log('served')
        publisher.ask('hurry')
        # They all ask, at once, whether somebody is there.
        publisher.ask('start', threads=40)
        self.assertEqual([], publisher.ask('rounds', count=3, timeout=60,
                                           path=self.path))
        publisher.ask('stop', timeout=60)
        self.assertEqual([], publisher.troubles())
