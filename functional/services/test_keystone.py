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

"""A real service, keystone, publishes what it logs.

Guards against all that a test's own publisher does otherwise than a service:
when and in which process drivers are made, what notifications hold, which
locks and threads are about, and management commands beside the service. The
driver ``log``, configured beside ours, tells what was emitted.
"""

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading

from testtools import content

import base

_CONFIG = """\
[DEFAULT]
transport_url = fake://
log_dir = {directory}
log_file = keystone.log
notification_format = basic
[database]
connection = sqlite:///{directory}/keystone.db?timeout=60
sqlite_synchronous = false
[cache]
enabled = false
[fernet_tokens]
key_repository = {directory}/fernet
[credential]
key_repository = {directory}/credential
[identity]
password_hash_rounds = 4
[oslo_messaging_notifications]
driver = log
driver = unix
sock_path = {path}
"""
_PASSWORD = 'secret'
# Of the driver log.
_LOGGED = re.compile(
    r' INFO oslo\.messaging\.notification\.\S+ .*?(\{"message_id.*\})$')
# Workers of keystone, and threads of the test that keep them busy.
_WORKERS = 4
_THREADS = 4
_ROUNDS = 5


class _Connection(http.client.HTTPConnection):

    """HTTP over a Unix socket."""

    def __init__(self, path):
        super().__init__('localhost', timeout=base.PATIENCE * 3)
        self._path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class KeystoneTest(base.FunctionalTestCase):

    # Seconds: there are processes that take long to start.
    DEFAULT_TIMEOUT = 300

    def setUp(self):
        super().setUp()
        self.config = os.path.join(self.directory, 'keystone.conf')
        self.log = os.path.join(self.directory, 'keystone.log')
        self.address = os.path.join(self.directory, 'http')
        with open(self.config, 'w') as config:
            config.write(_CONFIG.format(directory=self.directory,
                                        path=self.path))
        for name in 'fernet', 'credential':
            os.mkdir(os.path.join(self.directory, name), 0o700)
        self.manage('db_sync')
        # Readers and a writer at once; this is kept in the file.
        with contextlib.closing(sqlite3.connect(os.path.join(
                self.directory, 'keystone.db'))) as database:
            database.execute('PRAGMA journal_mode = WAL')
        for name in 'fernet_setup', 'credential_setup':
            self.manage(name, '--keystone-user', '%d' % os.geteuid(),
                        '--keystone-group', '%d' % os.getegid())
        self.addOnException(self._show_log)

    def _show_log(self, _):
        with open(self.log, errors='replace') as log:
            self.addDetail('keystone.log', content.text_content(
                ''.join(log.readlines()[-200:])))

    def manage(self, *arguments):
        """Run keystone-manage."""
        command = os.path.join(os.path.dirname(sys.executable),
                               'keystone-manage')
        result = subprocess.run(
            [command if os.path.exists(command)
             else shutil.which('keystone-manage'),
             '--config-file', self.config, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
        self.assertEqual(0, result.returncode, result.stdout.decode())

    def bootstrap(self):
        """Create the first user; this emits notifications."""
        self.manage('bootstrap', '--bootstrap-password', _PASSWORD)

    def serve(self):
        """Start keystone, and wait until it listens."""
        output = os.path.join(self.directory, 'uwsgi.log')
        with open(output, 'wb') as log:
            process = subprocess.Popen(
                [sys.executable, '-c', 'import pyuwsgi; pyuwsgi.run()',
                 '--module', 'keystone.wsgi.api', '--master', '--need-app',
                 '--http-socket', self.address, '--disable-logging',
                 '--processes', '%d' % _WORKERS, '--enable-threads',
                 '--lazy-apps', '--buffer-size', '65535'],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, env=dict(
                    os.environ, OS_KEYSTONE_CONFIG_FILES=self.config))
        self.addCleanup(base._kill_session, process)
        base.wait_until(lambda: os.path.exists(self.address),
                        'keystone listens', timeout=60)

    def request(self, method, path, body=None, token=None):
        """Ask keystone; the answer's headers and what its body holds.

        It is asked again where SQLite gave up: "database is locked". What
        was to be deleted may be gone by then.
        """
        for attempt in range(20):
            with contextlib.suppress(http.client.RemoteDisconnected):
                status, headers, data = self._request(
                    method, path, body, token)
                if status != 500:
                    break
        if not (method == 'DELETE' and status == 404 and attempt):
            self.assertEqual(2, status // 100, data)
        return headers, json.loads(data or b'{}')

    def _request(self, method, path, body, token):
        headers = {'Content-Type': 'application/json'}
        if token:
            headers['X-Auth-Token'] = token
        with contextlib.closing(_Connection(self.address)) as connection:
            connection.request(method, '/v3' + path,
                               json.dumps(body) if body else None, headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def authenticate(self):
        domain = {'id': 'default'}
        headers, _ = self.request('POST', '/auth/tokens', {'auth': {
            'identity': {'methods': ['password'], 'password': {'user': {
                'name': 'admin', 'domain': domain, 'password': _PASSWORD}}},
            'scope': {'project': {'name': 'admin', 'domain': domain}}}})
        return headers['X-Subject-Token']

    def create_and_delete(self, token, name):
        """Create a project and a user, and delete them."""
        made = []
        for kind in 'project', 'user':
            _, answer = self.request('POST', '/%ss' % kind, {
                kind: {'name': name, 'domain_id': 'default'}}, token)
            made.append('/%ss/%s' % (kind, answer[kind]['id']))
        for path in made:
            self.request('DELETE', path, token=token)

    def logged(self):
        """The notifications that the log has, by id, with their process."""
        messages = {}
        with open(self.log) as log:
            for line in log:
                match = _LOGGED.search(line)
                if match:
                    message = json.loads(match.group(1))
                    messages[message['message_id']] = message
                    message['pid'] = line.split()[2]
        return messages

    def assert_received(self, subscriber, known=()):
        """Fail unless all that was logged was received.

        :param known: ids that may be missing
        """
        logged = self.logged()
        due = set(logged).difference(known)

        def received():
            return {message['message_id']: message
                    for message in subscriber.messages}

        base.wait_until(lambda: due <= set(received()), lambda: '%r at %s' % (
            [logged[each] for each in due.difference(received())],
            subscriber))
        self.assertLessEqual(set(received()), set(logged))
        self.assertEqual(0, subscriber.lost)
        for key, message in received().items():
            self.assertEqual(logged[key]['event_type'], message['event_type'])
            self.assertEqual(logged[key]['payload'], message['payload'])

    def test_management_command_beside_a_service(self):
        self.publisher()
        subscriber = self.subscribe()
        self.bootstrap()
        self.assertGreaterEqual(len(self.logged()), 5)
        self.assert_received(subscriber)

    def test_four_workers(self):
        self.bootstrap()
        self.serve()
        token = self.authenticate()
        # A worker serves once it has emitted.
        self.create_and_delete(token, 'first')
        subscriber = self.subscribe()
        known = set(self.logged())
        problems = []

        def run(index):
            try:
                for number in range(_ROUNDS):
                    self.create_and_delete(
                        token, 'name-%d-%d' % (index, number))
            except Exception as error:
                problems.append(error)

        threads = [threading.Thread(target=run, args=(index,))
                   for index in range(_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([], problems)
        self.assert_received(subscriber, known)
        new = [message for key, message in self.logged().items()
               if key not in known]
        self.assertGreaterEqual(len(new), _THREADS * _ROUNDS * 3)
        self.assertGreater(len({message['pid'] for message in new}), 1)
