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

"""A service with workers of cotyledon, such as nova's and ceilometer's.

As they do, the master makes its Notifier first, and keeps it in a global of a
module. Whether workers find it there is up to multiprocessing: what was
forked does, what comes from a fork server has to make one of its own.
"""

import cotyledon
import publisher

LAST_WORDS = 5

_services = []      # the master's, in a process that was forked from it


class Worker(cotyledon.Service):

    """Does what it is told by a socket, and emits once more at its end."""

    def __init__(self, worker_id, config_file, control):
        super().__init__(worker_id)
        self._control = control
        if not _services:
            publisher.set_up_logging()
            service = publisher.Service(config_file)
            service.open()
            _services.append(service)

    def run(self):
        _services[0].be_child(self._control)

    def terminate(self):
        # What comes next is os._exit().
        _services[0].emit(LAST_WORDS)


def run_master(service, workers, control):
    """Start the workers, and others when they die, until SIGTERM."""
    service.end = None      # or it would be the end of what is forked
    _services.append(service)
    manager = cotyledon.ServiceManager()
    manager.add(Worker, workers, (service.config_file, control))
    manager.run()
