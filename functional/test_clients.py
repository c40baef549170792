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

"""Everyday programs can subscribe without any code of ours.

Guards against a stream that only our own reader understands, and against a
server that takes the end of a client's input (``nc -U PATH </dev/null``) for
the end of its interest: the client would print less than was emitted, or
end early.
"""

import os
import shutil
import subprocess

import base


class ClientTest(base.FunctionalTestCase):

    def _check_client(self, arguments, stdin=subprocess.DEVNULL):
        self._require(arguments[0])
        publisher = self.publisher()
        publisher.wait_log('served')
        client = self.client(arguments, stdin=stdin)
        publisher.wait_log('connected: pid %d,' % client.pid)
        # More than the client's pipe and the socket hold.
        for _ in range(10):
            publisher.ask('emit_real')
        self.assert_complete(client, 1000)
        publisher.ask('emit', count=1)
        self.assert_complete(client, 1001)
        publisher.tell('leave')
        publisher.wait_exit()
        client.wait_end()
        self.assertEqual(b'', client.rest)

    def _require(self, program):
        if shutil.which(program) is None:
            self.skipTest('%s is not installed' % program)

    def test_nc_without_input(self):
        self._check_client(['nc', '-U', self.path])

    def test_nc_with_a_terminal(self):
        reading, writing = os.pipe()    # on which nothing ever comes
        self.addCleanup(os.close, writing)
        self.addCleanup(os.close, reading)
        self._check_client(['nc', '-U', self.path], stdin=reading)

    def test_ncat_without_input(self):
        self._check_client(['ncat', '-U', self.path])

    def test_ncat_that_only_receives(self):
        self._check_client(['ncat', '--recv-only', '-U', self.path])

    def test_socat(self):
        self._check_client(['socat', '-u', 'UNIX-CONNECT:' + self.path, '-'])

    def test_python(self):
        self._check_client(base.CAT + [self.path])

    def test_jq_filters_by_event_type(self):
        self._require('nc')
        self._require('jq')
        publisher = self.publisher()
        publisher.wait_log('served')
        client = self.client(
            ['sh', '-c', 'nc -U "$1" </dev/null | jq --unbuffered -c '
             '\'select(.event_type == "test.event")\'', 'sh', self.path])
        publisher.wait_log('connected: pid')
        publisher.ask('emit_real')
        publisher.ask('emit', count=3)
        self.assert_complete(client, 3)
        self.assertEqual([1, 2, 3], [message['payload']['number']
                                     for message in client.messages])
