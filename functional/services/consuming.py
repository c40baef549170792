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

import os
import subprocess
import sys

from testtools import content

import base


class ConsumerTestCase(base.FunctionalTestCase):

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
