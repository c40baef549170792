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

"""Run nova's notification sample tests, with our driver beside nova's fakes.

These tests put a fake in the place of each of nova's two Notifiers, whatever
drivers are configured. So the fakes are derived from here, under the names by
which their fixture makes them: what one has recorded is written down, and goes
to a Notifier with our driver, too. What is emitted in a test before there are
fakes, such as of flavors, goes nowhere.

Arguments: the unpacked source distribution of nova, and where to write. Waits
for a line on standard input as soon as the path is served. The path comes from
the environment, by oslo.config.
"""

import functools
import importlib
import json
import sys
import threading
import unittest

_TESTS = '/nova/tests/functional/notification_sample_tests'
# Times that a test is run until it passes. On native threads some of nova's
# race: test_rebuild_server_exc tells what shall fail after it has begun.
_TRIES = 3
# What is recorded first is to be published first.
_lock = threading.Lock()


@functools.cache
def _wait_for_subscriber():
    sys.stdin.readline()


class _Record(list):

    """What a fake recorded. Tests remove from it, at any time, and change it.

    :param output: the file to write to
    :param topics: of what the fake gets, unless they are the default
    """

    def __init__(self, output, topics):
        super().__init__()
        self._output = output
        self._more = {'topics': topics} if topics else {}

    def append(self, message):
        super().append(message)
        fields = message if isinstance(message, dict) else message._asdict()
        json.dump({key: fields[key] for key in (
            'publisher_id', 'priority', 'event_type', 'payload')} | self._more,
            self._output)
        self._output.write('\n')


def _replace(fakes, name, attribute, output, topics=None):
    """Replace a fake by one that has a Notifier publish the same.

    :param fakes: the module
    :param attribute: the name of the fake's list
    """
    class Fake(getattr(fakes, name)):

        def __init__(self, *args, parent=None, **kwargs):
            super().__init__(*args, parent=parent, **kwargs)
            if parent is not None:
                self._notifier = parent._notifier
                return
            setattr(self, attribute, _Record(output, topics))
            self._notifier = fakes.oslo_messaging.Notifier(
                self.transport, driver='unix', serializer=self._serializer,
                topics=topics)
            _wait_for_subscriber()

        def _notify(self, priority, ctxt, event_type, payload):
            with _lock:
                super()._notify(priority, ctxt, event_type, payload)
                notifier = self._notifier.prepare(self.publisher_id)
                getattr(notifier, priority.lower())(ctxt, event_type, payload)

    setattr(fakes, name, Fake)


def main(source, output):
    loader = unittest.defaultTestLoader
    # First, for it sees to it that eventlet is not about.
    tests = loader.discover(source + _TESTS, top_level_dir=source)
    fakes = importlib.import_module('nova.tests.fixtures.notifications')
    _replace(fakes, 'FakeNotifier', 'notifications', output)
    _replace(fakes, 'FakeVersionedNotifier', 'versioned_notifications',
             output, ['versioned_notifications'])
    for _ in range(_TRIES):
        result = unittest.TextTestRunner().run(tests)
        if result.wasSuccessful():
            return 0
        # Anew, for nova's tests leave nothing of themselves.
        tests = loader.loadTestsFromNames(
            test.id() for test, _ in result.failures + result.errors)
    return 1


if __name__ == '__main__':
    with open(sys.argv[2], 'w') as file:
        sys.exit(main(sys.argv[1], file))
