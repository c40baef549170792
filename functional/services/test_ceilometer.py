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


"""A real consumer, ceilometer's notification agent, by configuration alone.

Guards against what a test's own listener does otherwise than a service: it
forks, listens to 98 pairs of target and priority, in batches, and requeues.
"""

import json
import os

import base
import consuming

_CONFIG = """\
[DEFAULT]
use_stderr = true
pipeline_cfg_file = {directory}/pipeline.yaml
event_pipeline_cfg_file = {directory}/event_pipeline.yaml
[notification]
workers = 1
messaging_urls = unix://{path}
"""
_PIPELINE = """\
sources: []
sinks: []
"""
_EVENT_PIPELINE = """\
sources:
  - name: all
    events: ["*"]
    sinks: [file]
sinks:
  - name: file
    publishers: ["file://{directory}/events?json"]
"""


class CeilometerTest(consuming.ConsumerTestCase):

    def setUp(self):
        super().setUp()
        config = self.write('ceilometer.conf', _CONFIG)
        self.write('pipeline.yaml', _PIPELINE)
        self.write('event_pipeline.yaml', _EVENT_PIPELINE)
        self.start(self.command('ceilometer-agent-notification',
                                '--config-file', config))

    def outputs(self):
        """The events in ceilometer's output."""
        try:
            with open(os.path.join(self.directory, 'events')) as lines:
                return [json.loads(line) for line in lines]
        except FileNotFoundError:
            return []

    def events(self):
        """Their ids."""
        return [each['message_id'] for each in self.outputs()]

    def feed(self, publisher):
        """Have all real notifications published; the ids that they got."""
        subscriber = self.subscribe()
        publisher.ask('emit_real')
        subscriber.wait(100)
        return [each['message_id'] for each in subscriber.messages]

    def test_events_have_what_the_context_tells(self):
        ctxt = {'request_id': 'req-1', 'user_id': 'u', 'project_id': 'p',
                'auth_token': 'secret'}
        publisher = self.publisher(send_context=True)
        publisher.wait_log('connected: pid', timeout=60)
        publisher.ask('emit', count=14, ctxt=ctxt)      # two of each priority
        base.wait_until(self.outputs, 'an event', 60)
        traits = {each['name']: each['value']
                  for each in self.outputs()[0]['traits']}
        del ctxt['auth_token']
        self.assertEqual(ctxt, {name: traits.get(name) for name in ctxt})
        self.assertNotIn('secret', str(self.outputs()))

    def test_events_are_those_that_were_published(self):
        fed = []
        for _ in range(3):
            publisher = self.publisher()
            # From its worker, beside which there is nobody yet.
            publisher.wait_log('connected: pid', timeout=60)
            fed += self.feed(publisher)
            base.wait_until(lambda: len(self.events()) >= len(fed),
                            lambda: '%d events, not %d' % (
                                len(fed), len(self.events())), 60)
            publisher.kill()
            publisher.wait_exit()
        self.assertEqual(300, len(set(fed)))
        self.assertEqual(sorted(fed), sorted(self.events()))
        self.assertEqual([], self.log('Traceback'))
