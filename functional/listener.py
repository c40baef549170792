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


"""A service to be tested that consumes: notification listeners by URL.

It acts on commands as publisher.py does, and has commands of its own.
"""

import collections
import os
import sys
import threading
import time

import oslo_messaging
from oslo_messaging import conffixture

import publisher
import unix_notifier

RESULT = oslo_messaging.NotificationResult


class Endpoint:

    """Keeps count of what it was given, in any of the executor's threads."""

    def __init__(self, delay=0, requeue=0, last=sys.maxsize, rule=None):
        """Be an endpoint.

        :param delay: seconds that each message takes
        :param requeue: how often each message is requeued
        :param last: the number of the last that is
        :param rule: arguments of a filter
        """
        if rule is not None:
            self.filter_rule = oslo_messaging.NotificationFilter(**rule)
        self._delay = delay
        self._requeue = requeue
        self._last = last
        self._lock = threading.Lock()
        self.seen = collections.Counter()   # by source and number
        self.ids = set()
        self.ctxts = []
        self.lost = 0
        self.interrupted = 0
        self.batches = []

    def _count(self, event_type, payload, metadata):
        with self._lock:
            if event_type == 'notifications.lost':
                self.lost += payload['lost']
                return RESULT.HANDLED
            if event_type == 'notifications.interrupted':
                self.interrupted += 1
                return RESULT.HANDLED
            self.ids.add(metadata['message_id'])
            key = (payload['source'], payload['number'])
            self.seen[key] += 1
            requeue = (self.seen[key] <= self._requeue
                       and payload['number'] <= self._last)
        time.sleep(self._delay)
        return RESULT.REQUEUE if requeue else RESULT.HANDLED

    def info(self, ctxt, publisher_id, event_type, payload, metadata):
        if ctxt:
            self.ctxts.append(ctxt)
        return self._count(event_type, payload, metadata)

    audit = debug = warn = error = critical = sample = info


class BatchEndpoint(Endpoint):

    def info(self, messages):
        with self._lock:
            self.batches.append(len(messages))
        for each in messages:
            self._count(each['event_type'], each['payload'],
                        each['metadata'])

    audit = debug = warn = error = critical = sample = info


class Service(publisher.Service):

    """What a consumer does, a method for each command."""

    def __init__(self, config_file):
        super().__init__(config_file)
        self.servers = []
        self.endpoints = []

    def listen(self, url, batch=None, fixture=False,
               topics=('notifications', 'others'), **kwargs):
        """Start a listener; it is the next in number, from 0 on.

        :param batch: arguments of a batch listener, if it is to be one
        :param fixture: whether oslo.messaging's fixture sets the URL
        :param kwargs: of the endpoint
        """
        if fixture:
            conf_fixture = conffixture.ConfFixture(self.conf)
            conf_fixture.setUp()
            conf_fixture.transport_url, url = url, None
        transport = oslo_messaging.get_notification_transport(
            self.conf, url=url)
        targets = [oslo_messaging.Target(topic=topic) for topic in topics]
        if batch is None:
            endpoint = Endpoint(**kwargs)
            server = oslo_messaging.get_notification_listener(
                transport, targets, [endpoint], 'threading',
                allow_requeue=True)
        else:
            endpoint = BatchEndpoint(**kwargs)
            server = oslo_messaging.get_batch_notification_listener(
                transport, targets, [endpoint], 'threading',
                allow_requeue=True, **batch)
        server.start()
        self.servers.append(server)
        self.endpoints.append(endpoint)

    def heard(self, number=0):
        """What a listener was given so far."""
        endpoint = self.endpoints[number]
        return {'received': len(endpoint.seen),
                # Of a copy, for others go on to count.
                'deliveries': sum(list(endpoint.seen.values())),
                'lost': endpoint.lost,
                'interrupted': endpoint.interrupted,
                'largest': max(endpoint.batches, default=0)}

    def ids(self, number=0):
        """The message_ids of what a listener was given."""
        return sorted(self.endpoints[number].ids)

    def contexts(self, number=0):
        """The request contexts of what a listener was given, if any."""
        return self.endpoints[number].ctxts

    def unlisten(self, number=0):
        """Stop a listener, and wait for what it had handed out.

        :returns: seconds that stopping took
        """
        begin = time.perf_counter()
        self.servers[number].stop()
        seconds = time.perf_counter() - begin
        self.servers[number].wait()
        return seconds

    def subscribe_and_emit(self, count, path):
        """Subscribe, emit one, which must come first; over and over."""
        for _ in range(count):
            with unix_notifier.subscribe(path) as stream:
                self._emit(0, range(1))
                source = '%d/0' % os.getpid()
                for message in stream:
                    if message['payload'].get('source') == source:
                        break
                number = message['payload']['number']
                if number > self.numbers[source]:
                    raise AssertionError(number)
                while number != self.numbers[source]:
                    number = next(stream)['payload']['number']


if __name__ == '__main__':
    publisher.main(Service)
