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

"""The tests that nova has of its notifications publish them.

Guards against what is special in what nova emits: two Notifiers, of which one
has a topic of its own, made anew for each test; payloads of every kind that
nova has; threads of conductor, scheduler and compute in one process.
"""

import glob
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

from testtools import content

import base

_PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)),
                        'nova_samples.py')


class _Subscriber(base.SocketSubscriber):

    def _take(self, line):
        message = json.loads(line.decode('ascii'))
        # Not known to the fakes.
        del message['message_id'], message['timestamp']
        self.messages.append(message)


class NovaTest(base.FunctionalTestCase):

    # Seconds: nova's tests take minutes.
    DEFAULT_TIMEOUT = 1800

    def start(self):
        """Have nova begin its tests, once we are connected."""
        archive, = glob.glob(os.environ['NOVA_SDIST'])
        shutil.unpack_archive(archive, self.directory, filter='data')
        source = os.path.join(self.directory, os.path.basename(
            archive.removesuffix('.tar.gz')))
        self.log = os.path.join(self.directory, 'nova.log')
        self.record = os.path.join(self.directory, 'record')
        with open(self.log, 'wb') as log:
            process = subprocess.Popen(
                [sys.executable, _PROGRAM, source, self.record],
                stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=source,
                start_new_session=True, env=dict(
                    os.environ, OS_NOVA_DISABLE_EVENTLET_PATCHING='true',
                    OS_OSLO_MESSAGING_NOTIFICATIONS__SOCK_PATH=self.path))
        self.addCleanup(base._kill_session, process)
        self.addOnException(self._show_log)
        base.wait_until(
            lambda: os.path.exists(self.path) or process.poll() is not None,
            'nova serves the path', timeout=300)
        self.assertIsNone(process.poll(), 'nova fails')
        subscriber = _Subscriber(self.path)
        self.addCleanup(subscriber.close)
        subscriber.go()
        process.stdin.write(b'\n')
        process.stdin.close()
        return process, subscriber

    def _show_log(self, _):
        with open(self.log, errors='replace') as log:
            self.addDetail('nova', content.text_content(log.read()))

    def test_subscriber_gets_what_the_fakes_record(self):
        process, subscriber = self.start()
        self.assertEqual(0, process.wait(), 'nova fails')
        subscriber.wait_end()
        self.assertEqual([], subscriber.problems)
        with open(self.record) as lines:
            recorded = [json.loads(line) for line in lines]
        for number, pair in enumerate(itertools.zip_longest(
                recorded, subscriber.messages)):
            self.assertEqual(*pair, 'number %d' % number)
        with open(self.log, errors='replace') as log:
            tests = re.search(r'^Ran (\d+) tests', log.read(), re.MULTILINE)
        self.addDetail('numbers', content.text_content(
            '%s, %d notifications' % (tests[0], len(recorded))))
        self.assertGreaterEqual(int(tests[1]), 47)
        self.assertGreaterEqual(len(recorded), 1000)
