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

"""publisher.py under eventlet.monkey_patch().

    eventlet_publisher.py WHEN CONFIG_FILE

WHEN is ``before`` or ``after``: when the process is patched, in relation to
the import of the driver. Its threads are green: it stands still unless it
waits.
"""

import sys

import eventlet  # noqa: H905
from eventlet import hubs  # noqa: H905
from eventlet import tpool  # noqa: H905
import greenlet

if sys.argv.pop(1) == 'after':
    import unix_notifier  # noqa: F401
eventlet.monkey_patch()

import os  # noqa: E402
import time  # noqa: E402

import publisher  # noqa: E402


class Service(publisher.Service):

    """More commands, for what only concerns green threads."""

    def __init__(self, config_file):
        super().__init__(config_file)
        self.gap = 0
        self.renew = False

    def emit_traced(self, count, size=0):
        """Emit, and tell which calls let other green threads run."""
        switches = []
        guilty = []
        old = greenlet.settrace(lambda *args: switches.append(args))
        try:
            for number in range(count):
                before = len(switches)
                self._emit(0, range(1), size)
                if len(switches) > before:
                    guilty.append(number)
        finally:
            greenlet.settrace(old)
        return guilty

    def emit_natively(self, count):
        """Emit in a native thread, while green threads go on."""
        tpool.execute(self._emit, 1000, range(count))

    def tick(self):
        """From now on, measure for how long nobody else gets to run."""
        self.gap = 0

        def run():
            last = time.monotonic()
            while True:
                time.sleep(0.001)
                now = time.monotonic()
                self.gap = max(self.gap, now - last)
                last = now

        eventlet.spawn(run)

    def longest_gap(self):
        return self.gap

    def rest(self, seconds):
        """Let others run."""
        time.sleep(seconds)

    def hold(self, number):
        """Take all descriptors below the number."""
        self.limit_descriptors(number + 200)
        while not self.held or self.held[-1] < number:
            self.held.append(os.open(os.devnull, os.O_RDONLY))

    def fork(self, how, control):
        """Start a child; the base class tells how, and there are more.

        :param how: or green (os.fork, in a green thread that is not the main
                    one), renewed (with a new hub, as oslo.service does)
        """
        if how == 'green':
            return eventlet.spawn(super().fork, 'fork', control).wait()
        self.renew = how == 'renewed'
        return super().fork('fork' if self.renew else how, control)

    def be_child(self, control):
        if self.renew:
            hubs.use_hub()
        super().be_child(control)

    def fork_to_emit(self, count):
        """Start a child that does nothing but emit, and exits."""
        pid = os.fork()
        if not pid:
            self.in_child = True
            self._emit(0, range(count), pause=0.001)
            sys.exit(0)
        return pid


def _lines():
    """The lines of stdin, which a file would wait for natively."""
    rest = b''
    while data := os.read(0, 65536):
        *lines, rest = (rest + data).split(b'\n')
        yield from lines


if __name__ == '__main__':
    sys.stdin = _lines()
    publisher.main(Service)
