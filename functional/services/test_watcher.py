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

"""A real consumer, watcher's decision engine, by configuration alone.

Guards against what a test's own listener does otherwise than a service: it is
made before the fork and started after, with a pool, and for two exchanges.
"""

import re
import sys
import uuid

import consuming

_CONFIG = """\
[DEFAULT]
debug = true
use_stderr = true
transport_url = fake://
[database]
connection = sqlite:///{directory}/watcher.db
[oslo_messaging_notifications]
transport_url = unix://{path}
[collector]
collector_plugins = compute
"""
# There is no nova to ask for hosts, nor an audit: its model has one host.
_ENGINE = """
from watcher.cmd.eventlet import decisionengine
from watcher.decision_engine.model import element
from watcher.decision_engine.model import model_root
from watcher.decision_engine.model.collector import nova

model = model_root.ModelRoot()
model.add_node(element.ComputeNode(uuid='node', hostname='host-1'))
nova.NovaClusterDataModelCollector.execute = lambda self: model
decisionengine.main()
"""


def _created(instance):
    """What watcher needs of nova's versioned notification."""
    flavor = {'memory_mb': 512, 'vcpus': 1, 'root_gb': 1}
    return ['versioned_notifications', 'nova-compute:host-1',
            'instance.create.end', {
                'nova_object.version': '1.0',
                'nova_object.data': {
                    'uuid': instance, 'state': 'active', 'host': 'host-1',
                    'node': 'host-1', 'host_name': 'server', 'metadata': {},
                    'display_name': 'server', 'tenant_id': 'project',
                    'created_at': '2026-01-01T00:00:00Z', 'image_uuid': 'id',
                    'flavor': {'nova_object.data': flavor}}}]


class WatcherTest(consuming.ConsumerTestCase):

    def setUp(self):
        super().setUp()
        config = self.write('watcher.conf', _CONFIG)
        self.run_command('watcher-db-manage', '--config-file', config,
                         'create_schema')
        self.start([sys.executable, '-c', _ENGINE, '--config-file', config])

    def mapped(self):
        """The instances that watcher has put on the host, each time."""
        return re.findall('Mapped instance (.*) to node ', self.read_log())

    def test_model_has_what_was_created_while_workers_came_and_went(self):
        instances = [str(uuid.uuid4()) for _ in range(consuming.EVENTS)]
        self.publish([_created(each) for each in instances])
        self.wait_same(instances, self.mapped)
        self.assertEqual([], self.log('Traceback'))
