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

"""A process that has nothing to send does nothing at all.

Guards against timers, polling, and descriptors that are reported readable
or writable for ever: the threads of the process would be given the CPU now
and then, which wakes a machine from sleep, or all the time.
"""

import os
import socket
import time

import base


class IdleTest(base.FunctionalTestCase):

    SECONDS = 3

    def test_idle_processes_are_never_given_the_cpu(self):
        names = ('nobody', 'one', 'parted', 'half-closed', 'stalled')
        paths = {name: self.path + name for name in names}
        publishers = dict(zip(names, self.publishers(
            *({'path': path} for path in paths.values()))))
        self.subscribe(paths['one'])
        self.subscribe(paths['parted']).close()
        publishers['parted'].wait_log('subscriber parted')  # a second later
        half_closed = self.subscribe(paths['half-closed'])
        half_closed.sock.shutdown(socket.SHUT_WR)
        self.cat(publishers['stalled'], paths['stalled']).stop()
        for publisher in publishers.values():
            publisher.ask('emit', count=1000, size=1000)
        before = {name: self._settled(publisher)
                  for name, publisher in publishers.items()}
        time.sleep(self.SECONDS)
        after = {name: base.switches(publisher.pid)
                 for name, publisher in publishers.items()}
        self.assertEqual(before, after)

    def _settled(self, publisher):
        """The count, once it did not change for a while."""
        last = [None, 0]

        def settled():
            count, now = base.switches(publisher.pid), time.monotonic()
            if count != last[0]:
                last[:] = count, now
            return now > last[1] + 0.1 and count

        return base.wait_until(settled, 'the process is idle')

    def test_waiting_for_the_path_takes_next_to_nothing(self):
        os.rmdir(os.path.dirname(self.path))
        publisher = self.publisher()
        publisher.wait_log('WARNING')
        # By then the time between two attempts has grown to a second.
        time.sleep(1.5)
        before = base.switches(publisher.pid)
        time.sleep(1.5)
        self.assertLess(base.switches(publisher.pid) - before, 15)
