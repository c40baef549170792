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


"""A broker takes over where one host is not enough.

RabbitMQ, from Debian's rabbitmq-server, is started on loopback, on ports and
in a directory of the test's own. Guards against a bridge that loses, doubles
or renames notifications, and against drivers that disturb each other.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys

import kombu
from testtools import content

import base

# Debian's wrapper in the PATH would change the user.
_PROGRAM = '/usr/lib/rabbitmq/bin/rabbitmq-server'
_LISTENER = os.path.join(os.path.dirname(base.__file__), 'listener.py')
_BRIDGE = os.path.join(os.path.dirname(base.__file__), 'bridge.py')


def _free_port():
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]


class RabbitTest(base.FunctionalTestCase):

    # Seconds: Erlang takes long to start.
    DEFAULT_TIMEOUT = 300

    def setUp(self):
        super().setUp()
        if not os.path.exists(_PROGRAM):
            self.skipTest('rabbitmq-server is not installed')
        self.home = os.path.join(self.directory, 'rabbit')
        os.mkdir(self.home)
        self._start()

    def _start(self):
        port, epmd = _free_port(), _free_port()
        plugins = os.path.join(self.home, 'plugins')
        with open(plugins, 'w') as file:
            file.write('[].')
        log = os.path.join(self.home, 'log')
        environment = dict(
            os.environ, HOME=self.home, RABBITMQ_NODENAME='un@localhost',
            RABBITMQ_NODE_IP_ADDRESS='127.0.0.1',
            RABBITMQ_NODE_PORT='%d' % port,
            RABBITMQ_DIST_PORT='%d' % _free_port(),
            RABBITMQ_MNESIA_BASE=self.home, RABBITMQ_LOG_BASE=self.home,
            RABBITMQ_PID_FILE=os.path.join(self.home, 'pid'),
            RABBITMQ_ENABLED_PLUGINS_FILE=plugins,
            RABBITMQ_CONF_ENV_FILE=os.devnull,
            ERL_EPMD_PORT='%d' % epmd, ERL_EPMD_ADDRESS='127.0.0.1')
        with open(log, 'wb') as file:
            process = subprocess.Popen(
                [_PROGRAM], env=environment, stdin=subprocess.DEVNULL,
                stdout=file, stderr=file, start_new_session=True)
        self.addCleanup(self._stop, process, environment, log)
        self.url = 'rabbit://guest:guest@127.0.0.1:%d/' % port
        address = self.url.replace('rabbit', 'amqp') + '/'
        base.wait_until(lambda: self._answers(address), 'RabbitMQ answers',
                        120)

    @staticmethod
    def _answers(address):
        with contextlib.suppress(OSError):
            with kombu.Connection(address, connect_timeout=5) as connection:
                connection.connect()
                return True

    def _stop(self, process, environment, log):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.send_signal(signal.SIGTERM)
            process.wait(base.PATIENCE)
        base._kill_session(process)
        # The server has started it, in a session of its own.
        subprocess.run([shutil.which('epmd'), '-kill'], env=environment,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with open(log, errors='replace') as file:
            self.addDetail('rabbit', content.text_content(file.read()))

    def listen(self):
        consumer = self.publisher(is_open=False, program=(_LISTENER,))
        consumer.ask('listen', url=self.url)
        return consumer

    def assert_same(self, subscriber, consumer, count):
        """Fail unless broker and socket gave the same, all, once."""
        self.assert_complete(subscriber, count)
        base.wait_until(
            lambda: consumer.ask('heard')['received'] >= count,
            lambda: '%d of %s' % (count, consumer.ask('heard')), 60)
        self.assertEqual(count, consumer.ask('heard')['deliveries'])
        self.assertEqual(
            sorted(each['message_id'] for each in subscriber.messages),
            consumer.ask('ids'))

    def test_both_drivers(self):
        publisher = self.publisher(lines=[
            'driver = messagingv2', 'transport_url = ' + self.url])
        publisher.wait_log('served')
        subscriber = self.subscribe()
        consumer = self.listen()
        publisher.ask('emit', count=500, timeout=60)
        self.assert_same(subscriber, consumer, 500)

    def test_bridge(self):
        publisher = self.publisher()
        publisher.wait_log('served')
        consumer = self.listen()
        process = subprocess.Popen(
            [sys.executable, '-W', 'ignore', _BRIDGE, self.path, self.url],
            start_new_session=True)
        self.addCleanup(base._kill_session, process)
        publisher.wait_log('connected: pid %d,' % process.pid)
        subscriber = self.subscribe()
        publisher.ask('emit', count=500)
        self.assert_same(subscriber, consumer, 500)
