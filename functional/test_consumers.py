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


"""Whoever consumes by our own means gets what nc would, and comes back.

Guards against listeners that lose in silence, that pile up what they cannot
handle, that hang when they are stopped or when the service is restarted, and
against a command line that ends in a traceback or does not end.
"""

import array
import collections
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time

import base
import unix_notifier

LISTENER = os.path.join(os.path.dirname(os.path.abspath(__file__)),
                        'listener.py')
COMMAND = [sys.executable, '-W', 'ignore', '-m', 'unix_notifier']
MIB = base.MIB


class ConsumerTestCase(base.FunctionalTestCase):

    def consumer(self):
        consumer = self.publisher(is_open=False, program=(LISTENER,))
        consumer.ask('load')
        return consumer

    @property
    def url(self):
        return 'unix://' + self.path

    def service(self, **options):
        service = self.publisher(**options)
        service.wait_log('served')
        return service

    def wait_heard(self, consumer, total, number=0):
        """Wait until what a listener got and lost adds up."""
        def heard():
            heard = consumer.ask('heard', number=number)
            return heard['received'] + heard['lost'] >= total and heard

        return base.wait_until(heard, lambda: '%d of %s' % (
            total, consumer.ask('heard', number=number)))


class SubscribeTest(ConsumerTestCase):

    def test_subscribed_when_it_returns(self):
        consumer = self.publisher(program=(LISTENER,))
        consumer.wait_log('served')
        consumer.ask('subscribe_and_emit', count=300, path=self.path)

    def test_subscribed_when_it_returns_beside_a_leader(self):
        self.service()
        consumer = self.publisher(program=(LISTENER,))
        consumer.wait_log('relayed to')
        consumer.ask('subscribe_and_emit', count=300, path=self.path)

    def test_it_follows_a_service_that_restarts(self):
        stream = unix_notifier.subscribe(self.path)
        self.addCleanup(stream.close)
        asked = 0       # before it is asked for what comes last
        for number in range(3):
            service = self.service()
            # take() is what tries again.
            base.wait_until(
                lambda: stream.take(0) or service.log('connected: pid'),
                'connected')
            service.ask('emit', count=5)
            if number:
                record = next(stream)
                self.assertEqual('notifications.interrupted',
                                 record['event_type'])
                self.assertLessEqual(
                    record['payload']['seconds'],
                    round(time.monotonic() - asked, 3))
            asked = time.monotonic()
            self.assertEqual([1, 2, 3, 4, 5], [
                next(stream)['payload']['number'] for _ in range(5)])
            service.kill()
            service.wait_exit()


class ListenerTest(ConsumerTestCase):

    def test_listener_comes_first_and_stays_while_services_come_and_go(self):
        consumer = self.consumer()
        consumer.ask('listen', url=self.url)
        for round_ in range(1, 4):
            service = self.service()
            service.wait_log('connected: pid %d,' % consumer.pid)
            service.ask('emit', count=100)
            heard = self.wait_heard(consumer, 100 * round_)
            self.assertEqual((100 * round_, round_ - 1),
                             (heard['deliveries'], heard['interrupted']))
            service.kill()
            service.wait_exit()
        self.assertLess(consumer.ask('unlisten'), 1)

    def test_two_listeners_and_nc_each_get_everything(self):
        if shutil.which('nc') is None:
            self.skipTest('nc is not installed')
        service = self.service()
        consumer = self.consumer()
        consumer.ask('listen', url=self.url)
        consumer.ask('listen', url=self.url, fixture=True)
        client = self.client(['nc', '-U', self.path],
                             stdin=subprocess.DEVNULL)
        service.wait_log('connected: pid %d,' % client.pid)
        service.ask('emit', count=1000)
        self.assert_complete(client, 1000)
        for number in range(2):
            heard = self.wait_heard(consumer, 1000, number)
            self.assertEqual((1000, 1000, 0), (
                heard['received'], heard['deliveries'], heard['lost']))
        consumer.ask('unlisten', number=0)
        service.ask('emit', count=10)
        self.wait_heard(consumer, 1010, 1)
        self.assertEqual(1000, consumer.ask('heard', number=0)['received'])

    def test_batches(self):
        service = self.service()
        consumer = self.consumer()
        consumer.ask('listen', url=self.url, batch={
            'batch_size': 50, 'batch_timeout': 0.1})
        consumer.ask('listen', url=self.url, batch={'batch_size': None})
        service.ask('emit', count=1020)
        for number in range(2):
            heard = self.wait_heard(consumer, 1020, number)
            self.assertEqual(1020, heard['deliveries'])
            self.assertEqual(0, heard['lost'])
        # The dispatcher parts a batch by its seven priorities.
        self.assertEqual(8, consumer.ask('heard', number=0)['largest'])
        self.assertLessEqual(consumer.ask('heard', number=1)['largest'], 15)

    def test_context_comes_with_what_a_follower_emits(self):
        self.service(send_context=True)
        follower = self.publisher(send_context=True)
        follower.wait_log('relayed to')
        consumer = self.consumer()
        consumer.ask('listen', url=self.url,
                     rule={'context': {'project_id': '^mine$'}})
        client = self.subscribe()
        client.KEYS = {*client.KEYS, 'context'}
        for project in 'mine', 'other':
            follower.ask('emit', count=10, ctxt={
                'project_id': project, 'auth_token': 'secret'})
        follower.ask('emit', count=10)
        client.wait(30)
        self.wait_heard(consumer, 10)
        self.assertEqual({'mine'}, {each['project_id'] for each in
                                    consumer.ask('contexts')})
        self.assertEqual([], consumer.log('without the request context'))
        found = [each['context'] for each in client.messages]
        self.assertEqual(
            ['mine', 'other', None],
            [each.get('project_id') for each in found[::10]])
        self.assertNotIn('secret', str(found))

    def test_listeners_get_their_topics_and_all_else_everything(self):
        """Of a service with two notifiers, as nova, and of a follower."""
        service = self.service()
        follower = self.publisher(lines=['topics = notifications,mine'])
        follower.wait_log('relayed to')
        consumer = self.consumer()
        topics = ['notifications'], ['versioned', 'mine'], ['none'], ['*']
        for each in topics:
            consumer.ask('listen', url=self.url, topics=each)
        client = self.subscribe()
        client._take = lambda line: found.append(json.loads(line))
        found = []
        service.ask('emit', count=10)
        service.ask('open', topics=['versioned'])
        service.ask('emit', count=20)
        follower.ask('emit', count=40)
        for number, count in enumerate((50, 60, 0, 70)):
            self.assertEqual(count, self.wait_heard(
                consumer, count, number)['deliveries'])
        base.wait_until(lambda: len(found) == 70, 'all came')
        self.assertEqual(
            {None: 10, ('versioned',): 20, ('notifications', 'mine'): 40},
            collections.Counter(each.get('topics') and tuple(each['topics'])
                                for each in found))

    def test_requeued_messages_return(self):
        service = self.service()
        consumer = self.consumer()
        consumer.ask('listen', url=self.url, requeue=1)
        service.ask('emit', count=10)
        base.wait_until(
            lambda: consumer.ask('heard')['deliveries'] == 20,
            lambda: 'each twice: %s' % consumer.ask('heard'))
        self.assertEqual(10, consumer.ask('heard')['received'])

    def test_what_is_requeued_for_ever_is_named_and_others_come(self):
        service = self.service()
        consumer = self.consumer()
        consumer.ask('listen', url=self.url, requeue=10 ** 9, last=500)
        service.ask('emit', count=2000)
        self.wait_heard(consumer, 2000)
        consumer.wait_log('stuck: ')
        self.assertEqual(1, len(consumer.log('stuck: ')))

    def test_stop_amid_requeues(self):
        service = self.service()
        consumer = self.consumer()
        consumer.ask('listen', url=self.url, requeue=10 ** 9)
        service.ask('emit', count=300)
        base.wait_until(lambda: consumer.ask('heard')['deliveries'] >= 400,
                        'all are requeued')
        self.assertLess(consumer.ask('unlisten'), 1)
        self.assertEqual(1, len(consumer.log('is dropped')))
        service.wait_log('parted: pid %d,' % consumer.pid)

    def test_slow_listener_knows_what_it_lost_and_stays_small(self):
        service = self.service(buffer_size=MIB)
        consumer = self.consumer()
        consumer.ask('listen', url=self.url, delay=0.02)
        service.ask('emit', count=100)      # executor and all is there
        self.wait_heard(consumer, 100)
        before = base.memory(consumer.pid)
        service.ask('emit', count=20000, size=1000)
        self.assertLess(base.memory(consumer.pid) - before, 8 * MIB)
        heard = self.wait_heard(consumer, 20100)
        self.assertEqual(20100, heard['received'] + heard['lost'])
        self.assertGreater(heard['lost'], 1000)
        self.assertLess(base.memory(consumer.pid) - before, 8 * MIB)
        consumer.wait_log('notifications were lost')


class CommandLineTest(ConsumerTestCase):

    def setUp(self):
        super().setUp()
        # What a shell has ignored in the background would be for good.
        for number in (signal.SIGHUP, signal.SIGINT):
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
                self.addCleanup(signal.signal, number, signal.SIG_IGN)

    def command(self, *arguments, by=(), stdout=subprocess.PIPE, **env):
        process = subprocess.Popen(
            [*by, *COMMAND, self.path, *arguments], stdin=subprocess.DEVNULL,
            stdout=stdout, stderr=subprocess.PIPE, start_new_session=True,
            env=dict(os.environ, **env))
        self.addCleanup(self._end, process)
        return process

    def full(self, **kwargs):
        """A command that cannot go on writing, and the end to read from."""
        reading, writing = map(open, os.pipe(), ('rb', 'wb'))
        self.addCleanup(reading.close)
        with writing:
            os.set_blocking(writing.fileno(), kwargs.pop('blocking', True))
            process = self.command(stdout=writing, **kwargs)
            size = fcntl.fcntl(writing, fcntl.F_GETPIPE_SZ)
        self.wait_status(process, 'connected')
        self.sender.ask('emit', count=1, size=5 * size)
        unread = array.array('i', [0])
        base.wait_until(lambda: not fcntl.ioctl(
            reading, termios.FIONREAD, unread) and unread[0] >= size,
            'it is full')
        return process, reading

    @staticmethod
    def _end(process):
        base._kill_session(process)
        process.communicate()

    def wait_status(self, process, text):
        for line in process.stderr:
            self.assertNotIn(b'Traceback', line)
            if text.encode() in line:
                return
        self.fail('no %r' % text)

    @staticmethod
    def emit_until_end(service, process):
        def ended():
            service.ask('emit', count=1)
            return process.poll() is not None

        base.wait_until(ended, 'it ends')

    def test_lines_are_those_of_the_socket_at_once(self):
        service = self.service()
        process = self.command()
        self.wait_status(process, 'connected')
        other = self.subscribe()
        service.ask('emit_real')
        self.assert_complete(other, 100)
        lines = [process.stdout.readline() for _ in range(100)]
        self.assertEqual(
            other.messages,
            [json.loads(line) for line in lines])

    def test_it_waits_and_comes_back_and_says_so(self):
        process = self.command('--count', '2')
        self.wait_status(process, 'waiting for it: No such file')
        for number in range(2):
            service = self.service()
            service.wait_log('connected: pid %d,' % process.pid)
            service.ask('emit', count=1)
            if number:
                self.assertIn(b'"notifications.interrupted"',
                              process.stdout.readline())
            self.assertIn(b'"number": 1,', process.stdout.readline())
            service.kill()
            service.wait_exit()
        self.assertEqual(0, process.wait(base.PATIENCE))
        self.assertEqual(b'', process.stdout.read())

    def test_filter_and_count(self):
        service = self.service()
        process = self.command('--event-type', '^identity[.].*[.]created$',
                               '--count', '3')
        self.wait_status(process, 'connected')
        service.ask('emit_real')
        output = process.communicate(timeout=base.PATIENCE)[0]
        self.assertEqual(0, process.returncode)
        self.assertEqual(3, len(re.findall(
            rb'"identity\.\w+\.created"', output)))
        self.assertEqual(3, output.count(b'\n'))

    def test_text(self):
        service = self.service()
        process = self.command('--text', '--count', '100')
        self.wait_status(process, 'connected')
        service.ask('emit_real')
        output = process.communicate(timeout=base.PATIENCE)[0]
        lines = output.decode().splitlines()
        self.assertEqual(100, len(lines))
        pattern = (r'^20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\.\d+  (INFO|ERROR|WARN)'
                   r'  [\w.]+  [\w.:@-]+(  \S.*)?$')
        self.assertEqual([], [line for line in lines
                              if not re.match(pattern, line)])

    def test_terminal_gets_columns_and_records_that_stand_out(self):
        terminal, output = pty.openpty()
        self.addCleanup(os.close, terminal)
        termios.tcsetwinsize(output, (40, 100))
        service = self.service(buffer_size=65536)
        process = self.command('--event-type', '[.]', stdout=output,
                               TERM='xterm', NO_COLOR='', COLUMNS='')
        self.wait_status(process, 'connected')
        written = b''

        def read_until(pattern):
            nonlocal written
            while not re.search(pattern, written):
                written += os.read(terminal, 65536)
            lines, written = written.decode().splitlines(), b''
            return [re.sub(r'\x1b\[[\d;]*m', '', line) for line in lines]

        service.ask('emit_real')
        lines = read_until(rb'(.*\n){100}')
        pattern = (r'^\d\d:\d\d:\d\d (INFO |ERROR|WARN ) (?=.{36} \S)[\w.]+ +'
                   r'[\w-]+ +[\w.:@-]+\u2026?$')
        self.assertEqual([], [line for line in lines if len(line) > 100
                              or not re.match(pattern, line)])
        base.stop(process.pid)
        service.ask('emit', count=2000, size=1000)
        os.kill(process.pid, signal.SIGCONT)
        rule = r'^[\d:]{8} ----- %s [(].*[)] -+$'
        self.assertTrue([
            line for line in read_until(rb'notifications lost: .*\n')
            if re.match(rule % r'notifications lost: \d+', line)
            and len(line) == 100])
        service.kill()
        service.wait_exit()
        service = self.service()
        line = read_until(rb'interrupted: .*\n')[-1]
        self.assertRegex(
            line, rule % r'interrupted: what came in [\d.]+ s may be missing')
        termios.tcsetwinsize(output, (40, 160))
        service.ask('emit_real')
        self.assertRegex(read_until(rb'(.*\n){100}')[0],
                         r'^\d{4}-\d\d-\d\d .* identity[.]controller1$')
        os.close(output)

    def test_loss_is_pointed_out(self):
        service = self.service(buffer_size=65536)
        process = self.command()
        self.wait_status(process, 'connected')
        base.stop(process.pid)
        service.ask('emit', count=2000, size=1000)
        os.kill(process.pid, signal.SIGCONT)
        client = base.Subscriber(
            lambda: os.read(process.stdout.fileno(), MIB), 'the command')
        client.go()
        client.wait(2000)
        self.assertEqual((2000, []), (client.total, client.problems))
        self.assertGreater(client.lost, 0)
        self.wait_status(process, 'notifications were lost')
        process.kill()
        client.join()

    def test_refusal_is_pointed_out(self):
        self.service(max_subscribers=1)
        self.subscribe()
        process = self.command()
        self.wait_status(process, 'refused: sock_max_subscribers is 1')

    def test_closed_pipe_ends_it_though_nothing_comes(self):
        service = self.service()
        process = self.command('--text')
        self.wait_status(process, 'connected')
        service.ask('emit', count=1)
        self.assertTrue(process.stdout.readline())
        process.stdout.close()
        self.assertEqual(0, process.wait(base.PATIENCE))
        self.assertNotIn(b'Traceback', process.stderr.read())

    def test_closed_pipe_ends_it_under_load(self):
        service = self.service()
        for _ in range(5):
            process = self.command()
            self.wait_status(process, 'connected')
            service.ask('start')
            self.assertTrue(process.stdout.readline())
            process.stdout.close()
            self.assertEqual(0, process.wait(base.PATIENCE))
            service.ask('stop')
            self.assertNotIn(b'Traceback', process.stderr.read())

    def test_signals_end_it_at_once(self):
        self.sender = self.service()
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            process = self.command()
            self.wait_status(process, 'connected')
            for process in process, self.full()[0]:
                process.send_signal(number)
                self.assertEqual(128 + number, process.wait(base.PATIENCE))
                self.assertEqual(b'', process.stderr.read())

    def test_signals_end_it_though_it_is_process_1(self):
        by = ('unshare', '--pid', '--fork', '--kill-child')
        if shutil.which('unshare') is None or subprocess.run(
                [*by, 'true'], stderr=subprocess.DEVNULL).returncode:
            self.skipTest('there is no unshare, or it is not allowed')
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            process = self.command(by=by)
            self.wait_status(process, 'waiting for it')
            with open('/proc/%d/task/%d/children' % (
                    process.pid, process.pid)) as children:
                os.kill(int(children.read()), number)
            self.assertEqual(128 + number, process.wait(base.PATIENCE))

    def test_signal_that_was_ignored_for_it_still_is(self):
        process = self.command(by=('sh', '-c', 'trap "" HUP; exec "$@"', ''))
        self.wait_status(process, 'waiting for it')
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(128 + signal.SIGTERM, process.wait(base.PATIENCE))

    def test_no_line_is_cut_whatever_the_output_is(self):
        self.sender = self.service()
        for blocking, unbuffered in ((True, ''), (True, '1'), (False, '1')):
            process, reading = self.full(
                blocking=blocking, PYTHONUNBUFFERED=unbuffered)
            base.stop(process.pid)
            os.kill(process.pid, signal.SIGCONT)
            self.sender.ask('emit', count=1)
            for _ in range(2):
                self.assertIn('payload', json.loads(reading.readline()))
            process.kill()

    def test_output_that_cannot_be_written_is_an_error_of_one_line(self):
        service = self.service()
        for output in ('>/dev/full', '>&-', '1</dev/null',
                       '>/dev/full 2>/dev/full', '>&- 2>&-'):
            process = self.command(by=self.redirected(output))
            self.emit_until_end(service, process)
            error = [line for line in process.stderr.read().splitlines()
                     if not line.endswith(b'connected')]
            self.assertEqual((1, '2>' not in output),
                             (process.returncode, len(error)), error)

    def test_terminal_that_went_is_an_error_of_one_line(self):
        terminal, output = pty.openpty()
        process = self.command(stdout=output)
        self.wait_status(process, 'waiting for it')
        os.close(output)
        os.close(terminal)
        self.assertEqual(1, process.wait(base.PATIENCE))
        self.assertEqual(1, process.stderr.read().count(b'\n'))

    def redirected(self, output):
        """Buffered, as it is unless told otherwise; else nothing is left."""
        return ('sh', '-c', 'unset PYTHONUNBUFFERED; "$@" ' + output, '')

    def test_errors_that_cannot_be_written_are_no_matter(self):
        service = self.service()
        for output in ('2>/dev/full', '2>&-'):
            process = self.command('--count', '1',
                                   by=self.redirected(output))
            self.emit_until_end(service, process)
            self.assertEqual(0, process.returncode)
            self.assertEqual(1, process.stdout.read().count(b'\n'))

    def test_refusal_is_not_counted(self):
        service = self.service(max_subscribers=1)
        other = self.subscribe()
        process = self.command('--count', '1')
        self.wait_status(process, 'refused: sock_max_subscribers is 1')
        self.assertIn(b'"notifications.refused"', process.stdout.readline())
        other.close()
        self.emit_until_end(service, process)
        self.assertEqual(0, process.returncode)
        self.assertIn(b'"number"', process.stdout.read().splitlines()[-1])

    def test_console_script(self):
        script = shutil.which('unix-notifier',
                              path=os.path.dirname(sys.executable))
        if script is None:
            self.skipTest('unix-notifier is not installed')
        done = subprocess.run([script, 'relative'], capture_output=True)
        self.assertEqual(2, done.returncode)
        self.assertIn(b"'relative' is not an absolute path", done.stderr)
        done = subprocess.run([script, '--help'], capture_output=True)
        self.assertEqual(0, done.returncode)
        self.assertIn(b'| jq', done.stdout)

    def test_it_does_not_show_what_eventlet_warns_of(self):
        script = os.path.join(self.directory, 'unix-notifier')
        with open(script, 'w') as file:
            file.write('from unix_notifier import main\nmain()\n')

        def errors(*command):
            env = dict(os.environ, PYTHONWARNINGS='')
            return subprocess.run([sys.executable, *command], env=env,
                                  capture_output=True).stderr.decode()

        page = 'Eventlet is deprecated'
        shown = page in errors('-W', 'default', script, '--help')
        for command in (script,), ('-m', 'unix_notifier'):
            self.assertEqual('', errors(*command, '--help'))
        # To a service nothing is done.
        self.assertEqual(shown, page in errors('-c', 'import unix_notifier'))
        self.assertEqual('', errors('-W', 'ignore', '-c', '''if True:
            import oslo_messaging, warnings
            before = list(warnings.filters)
            import unix_notifier
            assert warnings.filters == before'''))

    def test_jq_reads_it(self):
        if shutil.which('jq') is None:
            self.skipTest('jq is not installed')
        service = self.service()
        client = self.client(
            ['sh', '-c', '"$@" | jq --unbuffered -c .', 'sh', *COMMAND,
             self.path])
        service.wait_log('connected: pid')
        service.ask('emit', count=100)
        self.assert_complete(client, 100)
