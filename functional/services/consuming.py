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

"""What the tests of real consumers share.

A consumer is a process of a service, which is told where to listen by its
configuration. What it has got is read from its log, or from what it wrote.
"""

import collections
import os
import subprocess
import sys

from testtools import content

import base

# Seconds that a service may take to start, or for some hundred events, on a
# machine that is busy otherwise.
PATIENCE = 120
# Publishers at a time, how often one of them is replaced, and what each emits
# from one time to the next.
_WORKERS = 3
_ROUNDS = 6
_SHARE = 30
# What a test has to publish.
EVENTS = _WORKERS * _ROUNDS * _SHARE
# Seconds between two events of a worker, unless it is about to leave.
_PAUSE = 0.002


class ConsumerTestCase(base.RelayTestCase):

    # Seconds: there are services that take long to start.
    DEFAULT_TIMEOUT = 300

    def write(self, name, text, **values):
        """Write a file of the configuration; return its path."""
        path = os.path.join(self.directory, name)
        with open(path, 'w') as file:
            file.write(text.format(
                directory=self.directory, path=self.path, **values))
        return path

    @staticmethod
    def command(name, *arguments):
        """How to run a command of the service."""
        return [sys.executable, os.path.join(
            os.path.dirname(sys.executable), name), *arguments]

    def run_command(self, name, *arguments):
        """Run it, and wait for its end."""
        result = subprocess.run(
            self.command(name, *arguments), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=PATIENCE)
        self.assertEqual(0, result.returncode, result.stdout.decode())

    def start(self, arguments):
        """Start the service."""
        self._log = os.path.join(self.directory, 'log')
        with open(self._log, 'wb') as log:
            process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True)
        self.addCleanup(base._kill_session, process)
        self.addOnException(lambda _: self.addDetail(
            'service', content.text_content(self.read_log()[-100000:])))

    def read_log(self):
        """What the service has logged."""
        with open(self._log, errors='replace') as log:
            return log.read()

    def log(self, text):
        """The lines of its log that contain the text."""
        return [line for line in self.read_log().splitlines() if text in line]

    def wait_same(self, expected, got):
        """Wait until what was emitted has come; it must have come once.

        :param got: returns what came, each time
        """
        emitted = collections.Counter(expected)
        base.wait_until(lambda: not emitted - collections.Counter(got()),
                        lambda: '%d have come, but not %s' % (
                            len(got()), emitted - collections.Counter(got())),
                        PATIENCE)
        self.assert_never(lambda: collections.Counter(got()) - emitted,
                          'what came twice')

    def publish(self, events, listeners=1, ctxt=None, **options):
        """Emit by workers of whom one after another leaves, amid the stream.

        Each second time that is the one that leads. Another takes its place.

        :param listeners: how many connections of the service to wait for
        :param options: of the driver
        """
        workers = self.start_workers(_WORKERS, **options)
        base.wait_until(
            lambda: self.parent.visits('connected') >= listeners,
            'the service listens', PATIENCE)
        shares = [events[number:number + _SHARE]
                  for number in range(0, EVENTS, _SHARE)]
        for number in range(_ROUNDS):
            leader = self.wait_leader(workers)
            leaver = leader if number % 2 else next(
                each for each in workers if each is not leader)
            for worker in workers:
                worker.tell('emit_events', events=shares.pop(), ctxt=ctxt,
                            pause=0 if worker is leaver else _PAUSE)
            leaver.answer()
            leaver.tell('leave')
            self.assertEqual(0, self.parent.ask('reap', pid=leaver.pid))
            workers.remove(leaver)
            newcomer = self.worker()
            for worker in workers:
                worker.answer()
            workers.append(newcomer)
