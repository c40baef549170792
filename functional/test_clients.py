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

"""Everyday programs and languages can subscribe without any code of ours.

Guards against a stream that only our own reader understands, and against a
server that takes the end of a client's input (``nc -N``, ``ncat``) for
the end of its interest: the client would print less than was emitted, or
end early. And against a README that tells of a way to read the stream by
which long lines are lost: those of a language are in ``clients``.
"""

import os
import pwd
import re
import shutil
import subprocess
import tempfile

from testtools import content

import base

CLIENTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'clients')
# More than a pipe and a socket hold, and than what asyncio and Go take for a
# line unless told otherwise.
LONG = 1000000


class ClientTestCase(base.FunctionalTestCase):

    """Forks all publishers from one, for to load what they need takes long.

    They serve one path, one after the other.
    """

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.parent = None
        cls.room = tempfile.mkdtemp(prefix='un-', dir='/tmp')
        cls.addClassCleanup(shutil.rmtree, cls.room)
        cls.parent = base.Publisher(
            cls.room, {'path': os.path.join(cls.room, 's')})
        cls.addClassCleanup(cls.parent.close)
        cls.parent.ask('load')

    def setUp(self):
        super().setUp()
        self.path = os.path.join(self.room, 's')
        self.addCleanup(self._look_at_log)
        self.worker = self.fork(self.parent, 'fork')
        self.addCleanup(self._kill)
        self.worker.ask('open')
        base.wait_until(lambda: base.leader_pid(self.path) == self.worker.pid,
                        'it is served')

    def _look_at_log(self):
        log = '\n'.join(self.parent.log())
        self.addDetail('log', content.text_content(log))
        self.assertNotIn('Traceback', log)
        self.assertNotIn('unclosed <socket', log)

    def _kill(self):
        if self.worker is not None:
            self.worker.kill()
            self.parent.ask('reap', pid=self.worker.pid)

    def start(self, arguments, **kwargs):
        """Start a program, and wait until it is connected."""
        before = self.parent.visits('connected')
        kwargs.setdefault('stdin', subprocess.DEVNULL)
        client = self.client(arguments, **kwargs)
        base.wait_until(lambda: self.parent.visits('connected') > before
                        or client.ended.is_set(), 'it is connected')
        return client

    def check(self, arguments, **kwargs):
        """Fail unless a program prints all, and ends with the service."""
        self.require(arguments[0])
        client = self.start(arguments, **kwargs)
        self.worker.ask('emit', count=2)
        self.worker.ask('emit', count=1, size=LONG)
        self.worker.ask('emit_real')
        self.assert_complete(client, 103)
        # Not just because it has ended, or because something else came.
        self.worker.ask('emit', count=1)
        self.assert_complete(client, 104)
        self.worker.tell('leave')
        self.assertEqual(0, self.parent.ask('reap', pid=self.worker.pid))
        self.worker = None
        client.wait_end()
        self.assertEqual(b'', client.rest)
        self.assertEqual(0, client.process.wait(base.PATIENCE))

    def require(self, program):
        if shutil.which(program) is None:
            self.skipTest('%s is not installed' % program)


class ClientTest(ClientTestCase):

    def test_nc_without_input(self):
        self.check(['nc', '-U', self.path])

    def test_nc_with_a_terminal(self):
        reading, writing = os.pipe()    # on which nothing ever comes
        self.addCleanup(os.close, writing)
        self.addCleanup(os.close, reading)
        self.check(['nc', '-U', self.path], stdin=reading)

    def test_nc_that_closes_its_side(self):
        self.check(['nc', '-N', '-U', self.path])

    def test_ncat_without_input(self):
        self.check(['ncat', '-U', self.path])

    def test_ncat_that_only_receives(self):
        self.check(['ncat', '--recv-only', '-U', self.path])

    def test_socat(self):
        self.check(['socat', '-u', 'UNIX-CONNECT:' + self.path, '-'])

    def test_curl_that_takes_it_for_http(self):
        self.check(['curl', '-sSN', '--http0.9', '--unix-socket', self.path,
                    'http://localhost'])

    def test_python(self):
        self.check(base.CAT + [self.path])

    def test_jq_filters_by_event_type(self):
        self.require('nc')
        self.require('jq')
        client = self.start(
            ['sh', '-c', 'nc -U "$1" </dev/null | jq --unbuffered -c '
             '\'select(.event_type == "test.event")\'', 'sh', self.path])
        self.worker.ask('emit_real')
        self.worker.ask('emit', count=2)
        self.worker.ask('emit', count=1, size=LONG)
        self.assert_complete(client, 3)
        self.assertEqual([1, 2, 3], [message['payload']['number']
                                     for message in client.messages])


class LanguageTest(ClientTestCase):

    def run_client(self, program, *arguments, build=()):
        """Run a client of a language.

        :param program: the language's, followed by arguments
        :param build: what compiles the client first, instead
        """
        # Caches and toolchains of Go and Rust are at home.
        env = dict(os.environ, HOME=pwd.getpwuid(os.getuid()).pw_dir)
        if build:
            self.require(build[0])
            subprocess.run(build, env=env, check=True, cwd=CLIENTS)
        self.check([program, *arguments, self.path], env=env, cwd=CLIENTS)

    def test_asyncio(self):
        self.run_client(base.CAT[0], '-E', 'subscribe_asyncio.py')

    def test_node(self):
        self.run_client('node', 'subscribe.js')

    def test_go(self):
        program = os.path.join(self.directory, 'subscribe')
        self.run_client(program, build=('go', 'build', '-o', program,
                                        'subscribe.go'))

    def test_ruby(self):
        self.run_client('ruby', 'subscribe.rb')

    def test_perl(self):
        self.run_client('perl', 'subscribe.pl')

    def test_php(self):
        self.run_client('php', 'subscribe.php')

    def test_java(self):
        self.require('javac')
        home = os.path.dirname(os.path.dirname(os.path.realpath(
            shutil.which('javac'))))
        with open(os.path.join(home, 'release')) as lines:
            version = re.search('^JAVA_VERSION="([0-9]+)', lines.read(), re.M)
        if int(version.group(1)) < 16:
            self.skipTest('Java %s has no Unix sockets' % version.group(1))
        # Compiled for one second of use.
        self.run_client(os.path.join(home, 'bin', 'java'),
                        '-XX:TieredStopAtLevel=1', 'Subscribe.java')

    def test_rust(self):
        program = os.path.join(self.directory, 'subscribe')
        self.run_client(program, build=('rustc', '-o', program,
                                        'subscribe.rs'))
