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

"""A real consumer, vitrage-graph, whose two listeners share a transport.

Guards against listeners that are told apart by their topics alone, and get
what is the other's or starve it.
"""

import contextlib
import importlib.util
import os
import re
import sqlite3

import consuming

_CONFIG = """\
[DEFAULT]
debug = true
default_log_levels = vitrage=INFO, vitrage.entity_graph.processor=DEBUG
use_nova_versioned_notifications = false
use_stderr = true
transport_url = fake://
[database]
connection = sqlite:///{directory}/vitrage.db
[oslo_messaging_notifications]
transport_url = unix://{path}
[datasources]
types = nova.instance
notification_topics = notifications
[entity_graph]
datasources_values_dir = {values}
[evaluator]
workers = 1
[api]
workers = 1
"""
# As it makes the table, SQLite gives rows no numbers.
_EVENTS = """\
DROP TABLE events;
CREATE TABLE events (id INTEGER PRIMARY KEY, payload TEXT, is_vertex BOOLEAN,
                     created_at DATETIME, updated_at DATETIME);
"""


def _created(server):
    """What vitrage needs of nova's notification."""
    return ['notifications', 'compute.host-1', 'compute.instance.create.end',
            {'instance_id': server, 'hostname': server, 'state': 'active',
             'host': 'host-1', 'tenant_id': 'project'}]


def _raised(alarm):
    """As an evaluator of vitrage says it."""
    return ['vitrage.evaluator', 'vitrage_evaluator', 'evaluator.event', [
        {'type': 'add_vertex', 'alarm_name': alarm, 'severity': 'WARNING',
         'state': 'Active', 'target': 'resource',
         'vitrage_resource_type': 'nova.instance',
         'vitrage_entity_type': 'vitrage',
         'vitrage_datasource_action': 'update',
         'update_timestamp': '2026-01-01 00:00:00.000000',
         'vitrage_sample_timestamp': '2026-01-01T00:00:00Z'}]]


class VitrageTest(consuming.ConsumerTestCase):

    def setUp(self):
        super().setUp()
        # Its own tests have what a package puts into /etc/vitrage.
        root, = importlib.util.find_spec(
            'vitrage').submodule_search_locations
        config = self.write('vitrage.conf', _CONFIG, values=os.path.join(
            root, 'tests', 'resources', 'datasources_values'))
        self.run_command('vitrage-dbsync', '--config-file', config)
        with contextlib.closing(sqlite3.connect(os.path.join(
                self.directory, 'vitrage.db'))) as database:
            database.executescript(_EVENTS)
        self.start(self.command('vitrage-graph', '--config-file', config))

    def processed(self):
        """What vitrage has processed, each time."""
        return re.findall(
            r"processor event:\n.*'(?:hostname|alarm_name)': '([^']*)'",
            self.read_log())

    def test_each_listener_gets_its_own_while_workers_come_and_go(self):
        events = [(make, '%s-%d' % (what, number))
                  for number in range(consuming.EVENTS // 2)
                  for make, what in ((_created, 'server'), (_raised, 'alarm'))]
        self.publish([make(name) for make, name in events], listeners=2)
        self.wait_same([name for _, name in events], self.processed)
        self.assertEqual([], self.log('Got Exception for event'))
        self.assertEqual([], self.log('ENQUEUED:[vitrage_evaluator]'))
