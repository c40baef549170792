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

"""A real consumer, designate-sink, by configuration alone.

Guards against what a test's own listener does otherwise than a service: its
transport is made before the fork, and its handler needs the context.
"""

import contextlib
import os
import sys
import uuid

import consuming

_CONFIG = """\
[DEFAULT]
use_stderr = true
transport_url = fake://
[oslo_messaging_notifications]
transport_url = unix://{path}
[heartbeat_emitter]
emitter_type = noop
[service:sink]
enabled_notification_handlers = nova_fixed
workers = 1
[handler:nova_fixed]
zone_id = zone
formatv4 = %(hostname)s.%(project)s.%(zone)s
"""
# There is no designate-central to ask: what it is asked for is written down.
_SINK = """
from designate.central import rpcapi
from designate.cmd import sink

def create(self, context, zone_id, records_values, recordset_values):
    with open(%r, 'a') as file:
        print(recordset_values['name'], records_values[0]['data'],
              records_values[0]['managed_resource_id'], file=file)

rpcapi.CentralAPI.get_zone = lambda *_: {'id': 'zone', 'name': 'example.org.'}
rpcapi.CentralAPI.create_managed_records = create
sink.main()
"""


class DesignateTest(consuming.ConsumerTestCase):

    def setUp(self):
        super().setUp()
        config = self.write('designate.conf', _CONFIG)
        self.output = os.path.join(self.directory, 'records')
        self.start([sys.executable, '-c', _SINK % self.output,
                    '--config-file', config])

    def records(self):
        """Name, address and server of each record, each time."""
        with contextlib.suppress(FileNotFoundError):
            with open(self.output) as lines:
                return lines.read().splitlines()
        return []

    def test_servers_created_while_workers_came_and_went_have_records(self):
        servers = [('server-%d' % number, '10.0.%d.%d' % divmod(number, 250),
                    str(uuid.uuid4())) for number in range(consuming.EVENTS)]
        self.publish(
            [['notifications', 'compute.host-1', 'compute.instance.create.end',
              {'instance_id': server, 'hostname': name, 'fixed_ips': [
                  {'version': 4, 'address': address, 'label': 'private'}]}]
             for name, address, server in servers],
            ctxt={'project_name': 'demo'}, send_context=True)
        self.wait_same(['%s.demo.example.org. %s %s' % each
                        for each in servers], self.records)
        self.assertEqual([], self.log('Traceback'))
