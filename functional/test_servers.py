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

"""Applications in real servers publish from every worker.

Guards against what servers do to their workers: fork them in C, without
hooks, from a process that has made the drivers; end them after some requests,
amid others, with or without the exit handlers of Python; load the
application twice in one process. A worker would hang, would publish nothing,
or would take what it had queued with it.
"""

import contextlib
import glob
import http.client
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

from testtools import content

import base
import unix_notifier

LISTENER = (os.path.join(os.path.dirname(__file__), 'listener.py'),)
# Of the tests in which workers lead. In a long run, 20000.
REQUESTS = int(os.environ.get('RECYCLING_REQUESTS', 400))
ROUNDS = REQUESTS // 50
HERE = os.path.dirname(os.path.abspath(__file__))
_CONFIG = """\
[DEFAULT]
transport_url = fake://

[oslo_messaging_notifications]
driver = unix
sock_path = %s
"""
_APACHE = """\
ServerRoot {directory}
ServerName localhost
PidFile apache.pid
ErrorLog server.log
Listen 127.0.0.1:{port}
{user}
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule wsgi_module {modules}/mod_wsgi.so
StartServers 1
WSGISocketPrefix {directory}/wsgi
WSGIDaemonProcess app threads=4 maximum-requests=60 \
python-path={python_path}
WSGIProcessGroup app
WSGIScriptAlias /global {script} application-group=%{{GLOBAL}}
WSGIScriptAlias /sub {script} application-group=sub
<Directory {directory}>
Require all granted
</Directory>
"""


class _Connection(http.client.HTTPConnection):

    """HTTP over whatever socket there is."""

    def __init__(self, address):
        super().__init__('localhost', timeout=base.PATIENCE)
        self._address = address

    def connect(self):
        family = (socket.AF_UNIX if isinstance(self._address, str)
                  else socket.AF_INET)
        self.sock = socket.socket(family)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._address)


class ServerTestCase(base.FunctionalTestCase):

    def setUp(self):
        super().setUp()
        # Where the server listens.
        self.address = os.path.join(self.directory, 'http')
        self.config = os.path.join(self.directory, 'app.conf')
        with open(self.config, 'w') as config:
            config.write(_CONFIG % self.path)
        self.log = os.path.join(self.directory, 'server.log')
        self.sources = set()

    def need(self, module):
        """Skip the test unless the module can be had."""
        if importlib.util.find_spec(module) is None:
            self.skipTest('%s is not installed' % module)

    def serve(self, *arguments, **environment):
        """Start a server, and wait until it answers."""
        with open(self.log, 'wb') as log:
            process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                cwd=HERE, start_new_session=True,
                env=dict(os.environ, WSGI_APP_CONFIG=self.config,
                         **environment))
        self.addCleanup(self._end, process)
        base.wait_until(lambda: self._answers(process), 'server is up')
        return process

    def _end(self, process):
        base._kill_session(process)
        with open(self.log, errors='replace') as log:
            text = log.read()
        self.addDetail('log of the server', content.text_content(text))
        self.assertNotIn('Traceback', text)

    def _answers(self, process):
        self.assertIsNone(process.poll(), 'server has ended')
        with socket.socket(socket.AF_UNIX if isinstance(self.address, str)
                           else socket.AF_INET) as sock:
            return not sock.connect_ex(self.address)

    def request(self, path='/'):
        """Have the application emit; what it says about that."""
        with contextlib.closing(_Connection(self.address)) as connection:
            connection.request('GET', path)
            response = connection.getresponse()
            body = response.read()
            self.assertEqual(200, response.status, body)
            emitted = json.loads(body)
            if isinstance(emitted, list):
                self.sources.add(emitted[0])
                return tuple(emitted)

    def load(self, count, paths=('/',), threads=4, pause=0):
        """Make requests in some threads; what they emitted.

        :param pause: seconds between two of a thread
        """
        emitted = []
        problems = []

        def run():
            try:
                for number in range(count):
                    path = paths[number % len(paths)]
                    emitted.append(self.request(path))
                    time.sleep(pause)
            except Exception as error:
                problems.append(error)

        running = [threading.Thread(target=run) for _ in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        self.assertEqual([], problems)
        return emitted

    def _answers_again(self):
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.request()

    def pids(self):
        """The processes that have answered."""
        return {source.split('/')[0] for source in self.sources}

    def assert_received(self, subscriber, emitted):
        """Fail unless just that was received, and nothing twice."""
        self.assert_complete(subscriber, len(emitted))
        self.assertEqual(set(emitted), {
            (message['payload']['source'], message['payload']['number'])
            for message in subscriber.messages})

    def check_followers(self, *arguments, count=50, pids=5):
        """Fail if any notification is lost as workers come and go.

        Another service leads, so that the subscriber stays connected.

        :param pids: the number of processes that must at least have answered
        :returns: the server
        """
        leader = self.publisher()
        subscriber = self.subscribe()
        server = self.serve(*arguments)
        self.assert_received(subscriber, self.load(count))
        self.assertGreaterEqual(len(self.pids()), pids)
        self.assertEqual([], leader.troubles())
        return server

    def check_leaders(self, *arguments):
        """Fail if a subscriber notices that workers are recycled.

        They all may leave at once, or not yet be there again, hence another
        process is on the path; it is relieved again and again, or it would
        lead for ever.
        """
        with open(self.config, 'a') as config:
            config.write('sock_buffer_size = %d\n' % base.MIB)
        server = self.serve(*arguments, WSGI_APP_PAD='8000',
                            WSGI_APP_LAZY='1')  # or a master would lead
        base.wait_until(lambda: self.load(1) and os.path.exists(self.path),
                        'it is served')
        nursery = self.publisher(is_open=False, buffer_size=base.MIB)
        nursery.ask('load')
        other = self._relieve(nursery, None)
        readers, stalled, listener = self._all_kinds()
        before = listener.ask('heard')['received']
        emitted = self._recycle(server, nursery, other)
        stalled.go()
        for each in (*readers, stalled):
            self._check_whole(each, set(emitted))
        self.assertTrue(stalled.lost)
        heard = base.wait_until(
            lambda: (heard := listener.ask('heard'))['received'] >= before
            + len(emitted) and heard, lambda: listener.ask('heard'))
        self.assertEqual((heard['received'], 0, 0), (
            heard['deliveries'], heard['lost'], heard['interrupted']))
        with open(self.log) as log:
            here = log.read().count('handed on to')
        self.assertGreater(here, 0)
        self.assertGreater(here + len(nursery.log('handed on to')), 5)

    def _recycle(self, server, nursery, other):
        """Have workers leave, one by one and at a reload; what was emitted."""
        emitted = []
        for number in range(ROUNDS):
            # No faster than a server makes up for workers that leave.
            emitted += self.load(REQUESTS // 4 // ROUNDS, pause=0.02)
            if number != ROUNDS // 2:
                other = self._relieve(nursery, other)
            else:
                server.send_signal(signal.SIGHUP)
                base.wait_until(self._answers_again, 'it is there again')
        return emitted

    def _relieve(self, nursery, other):
        """Have a new process follow, and then the other one leave."""
        new = self.fork(nursery, 'fork')
        count = len(nursery.log('relayed to'))
        new.ask('open')
        base.wait_until(lambda: len(nursery.log('relayed to')) > count,
                        'it follows')
        if other is not None:
            other.tell('leave')
            nursery.ask('reap', pid=other.pid)
        return new

    def _all_kinds(self):
        """Subscribers that read, one that will, and a listener's process."""
        nc = ['nc', '-U', self.path] if shutil.which('nc') else (
            [*base.CAT, self.path])
        readers = [self.client(each) for each in (
            nc, nc, nc, [sys.executable, unix_notifier.__file__, self.path])]
        half_closed, slow, stalled = (
            self.subscribe(go=False) for _ in range(3))
        half_closed.sock.shutdown(socket.SHUT_WR)
        slow.size = 512
        for each in (half_closed, slow):
            each.go()
            readers.append(each)
        listener = self.publisher(is_open=False, program=LISTENER)
        listener.ask('listen', url='unix://' + self.path)
        base.wait_until(
            lambda: self.load(1) and listener.ask('heard')['received']
            and all(each.total for each in readers), 'all are connected')
        return readers, stalled, listener

    def _check_whole(self, reader, emitted):
        def missing():
            return len(emitted - {
                (each['payload'].get('source'), each['payload'].get('number'))
                for each in list(reader.messages)})

        base.wait_until(lambda: reader.ended.is_set()
                        or missing() <= reader.lost,
                        lambda: '%d missing at %s' % (missing(), reader))
        self.assertFalse(reader.ended.is_set(), reader)
        self.assertNotIn('notifications.interrupted', {
            each['event_type'] for each in reader.messages})

    def _has(self, subscriber, emitted):
        return any((message['payload']['source'],
                    message['payload']['number']) == emitted
                   for message in subscriber.messages[-5:])


class UwsgiTest(ServerTestCase):

    def setUp(self):
        self.need('pyuwsgi')
        super().setUp()

    def uwsgi(self, *arguments, processes=4):
        return (sys.executable, '-c', 'import pyuwsgi; pyuwsgi.run()',
                '--http-socket', self.address, '--module', 'wsgi_app',
                '--master', '--need-app', '--disable-logging',
                '--processes', '%d' % processes, '--max-requests', '20',
                '--min-worker-lifetime', '0', *arguments)

    def assert_no_thread(self, server):
        """Fail if the master has one, which uWSGI might fork in its middle.

        If the thread is busy at that instant the worker hangs for good.
        """
        self.assertEqual('1', base.status(server.pid)['Threads'])

    def test_application_made_in_the_master(self):
        self.assert_no_thread(self.check_followers(*self.uwsgi()))

    def test_application_made_in_the_master_with_threads_and_a_mule(self):
        leader = self.publisher()
        subscriber = self.subscribe()
        server = self.serve(*self.uwsgi(
            '--threads', '2', '--mule=wsgi_app:be_mule'))
        emitted = self.load(40, ('/', '/mule'))
        self.assert_complete(subscriber, len(emitted))
        received = {(message['payload']['source'],
                     message['payload']['number'])
                    for message in subscriber.messages}
        self.assertLessEqual(set(filter(None, emitted)), received)
        mules = {source.split('/')[0] for source, _ in received}
        self.assertEqual(1, len(mules - self.pids()))
        self.assert_no_thread(server)
        self.assertEqual([], leader.troubles())

    def test_application_made_in_each_worker(self):
        self.check_followers(
            *self.uwsgi('--lazy-apps', '--enable-threads', processes=2),
            count=20, pids=3)

    def test_workers_lead(self):
        self.check_leaders(*self.uwsgi(
            '--max-requests-delta', '20', '--forkbomb-delay', '0',
            '--binary-path', sys.executable))

    @staticmethod
    def _connected(log):
        with open(log) as file:
            return file.read().count('subscriber connected')

    def test_monkey_patched_worker_beside_another(self):
        """Where no hub runs between requests it sends inside notify()."""
        self.need('eventlet')
        self.serve(*self.uwsgi(processes=1))
        self.request()
        address, log = self.address, self.log
        for number, options in enumerate([(), ('--lazy-apps',)]):
            subscriber = self.subscribe()
            self.address, self.log = address + str(number), log + str(number)
            self.serve(*self.uwsgi(*options, processes=1),
                       WSGI_APP_PATCHED='1')
            emitted = {self.request()}
            # Who comes after that is let in once it was answered.
            self.subscribe()
            base.wait_until(lambda: self._connected(log) == 2 * number + 2,
                            'the leader has answered')
            for _ in range(10):
                emitted.add(self.request())
                # The first one, at the latest, with the second.
                base.wait_until(lambda: emitted <= {
                    (message['payload']['source'],
                     message['payload']['number'])
                    for message in list(subscriber.messages)}, 'it arrives')
            with open(self.log) as file:
                self.assertEqual(1, file.read().count('only follows'))
            self.address, self.log = address, log
            last = self.request()   # the other is not silenced
            base.wait_until(lambda: self._has(subscriber, last), 'it arrives')

    def test_monkey_patched_worker_does_not_lead(self):
        self.need('eventlet')
        self.serve(*self.uwsgi(processes=1), WSGI_APP_PATCHED='1')
        for _ in range(3):
            self.request()
        self.assertFalse(os.path.exists(self.path))
        leader = self.publisher()
        leader.wait_log('served')
        subscriber = self.subscribe()
        # It tries again once a second has passed, at a call.
        base.wait_until(lambda: self.request() and subscriber.total,
                        'it follows')
        emitted = self.request()
        base.wait_until(lambda: self._has(subscriber, emitted), 'it arrives')


class GunicornTest(ServerTestCase):

    def setUp(self):
        self.need('gunicorn')
        super().setUp()

    def gunicorn(self, *arguments, workers=4):
        return (sys.executable, '-m', 'gunicorn',
                '--bind', 'unix:' + self.address,
                '--workers', '%d' % workers, '--max-requests', '20',
                *arguments, 'wsgi_app:application')

    def test_application_made_in_the_master(self):
        self.check_followers(*self.gunicorn('--preload'))

    def test_application_made_in_each_worker_with_threads(self):
        self.check_followers(
            *self.gunicorn('--worker-class', 'gthread', '--threads', '4',
                           workers=2), count=20, pids=3)

    def test_workers_lead(self):
        # With more jitter a worker might lead till the reload.
        self.check_leaders(*self.gunicorn(
            '--preload', '--max-requests-jitter', '20'))


class ModWsgiTest(ServerTestCase):

    def setUp(self):
        version = '%d.%d' % sys.version_info[:2]
        apache = shutil.which('apache2') or '/usr/sbin/apache2'
        modules = glob.glob('/usr/lib/apache2/modules/mod_wsgi.so-' + version)
        if not os.path.exists(apache):
            self.skipTest('apache2 is not installed')
        if not modules:
            self.skipTest('mod_wsgi for Python %s is not installed' % version)
        super().setUp()
        self.apache = apache
        self.uid = None
        if os.geteuid() == 0:
            # Apache does not serve as root.
            self.uid = base.NOBODY
            os.chown(os.path.dirname(self.path), self.uid, self.uid)

    def test_two_interpreters_in_each_daemon(self):
        with socket.socket() as sock:
            sock.bind(('127.0.0.1', 0))
            self.address = sock.getsockname()
        if self.uid:
            self.need_readable_modules(self.uid)
        script = os.path.join(self.directory, 'app.wsgi')
        with open(script, 'w') as file:
            file.write('import os\n'
                       'os.environ["WSGI_APP_CONFIG"] = %r\n'
                       'from wsgi_app import application\n' % self.config)
        config = os.path.join(self.directory, 'apache.conf')
        with open(config, 'w') as file:
            file.write(_APACHE.format(
                directory=self.directory, port=self.address[1],
                modules='/usr/lib/apache2/modules', script=script,
                python_path=':'.join(base.python_path()),
                user='User #%d\nGroup #%d' % (self.uid, self.uid)
                if self.uid else ''))
        leader = self.publisher(uid=self.uid)
        subscriber = self.subscribe()
        # coverage cannot be had in a second interpreter of a process.
        process = self.serve(self.apache, '-DFOREGROUND', '-f', config,
                             COVERAGE_PROCESS_START='')
        emitted = self.load(30, ('/global', '/sub'))
        self.assert_received(subscriber, emitted)
        self.assertGreaterEqual(len(self.pids()), 2)
        self.assertEqual(len(self.pids()) * 2, len({
            source.rpartition('/')[0] for source in self.sources}))
        self.assertEqual([], leader.troubles())
        process.send_signal(signal.SIGTERM)
        process.wait(base.PATIENCE)
