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

"""Everybody who is connected gets everything, from connect() on.

Guards against a broadcast that serves the first subscriber better than the
last, mixes up or cuts lines, tells a newcomer of the past, or misses the
notification that follows a connect() at once: subscribers would differ from
each other or from what was emitted, lines would not parse, or a round of
connecting and notifying would never get its line.
"""

import json
import os

import base

NOTIFICATIONS = os.path.join(os.path.dirname(os.path.abspath(__file__)),
                             'notifications.ndjson')


class BroadcastTest(base.FunctionalTestCase):

    def test_every_subscriber_gets_everything_in_the_same_order(self):
        publisher = self.publisher()
        subscribers = [self.subscribe() for _ in range(40)]
        # Less than the buffer, so that nobody may lose anything.
        publisher.ask('emit', count=250, threads=4, size=500)
        for subscriber in subscribers:
            self.assert_complete(subscriber, 1000)
        orders = {tuple(message['message_id']
                        for message in subscriber.messages)
                  for subscriber in subscribers}
        self.assertEqual(1, len(orders))
        self.assertEqual(
            {'AUDIT', 'DEBUG', 'INFO', 'WARN', 'ERROR', 'CRITICAL', 'SAMPLE'},
            {message['priority'] for message in subscribers[0].messages})

    def test_real_notifications_arrive_as_they_were_emitted(self):
        publisher = self.publisher()
        subscriber = self.subscribe()
        publisher.ask('emit_real')
        with open(NOTIFICATIONS) as lines:
            expected = [json.loads(line) for line in lines]
        self.assert_complete(subscriber, len(expected))
        for message in expected + subscriber.messages:
            # These two are the Notifier's.
            del message['message_id'], message['timestamp']
        self.assertEqual(expected, subscriber.messages)

    def test_late_subscriber_gets_nothing_old(self):
        publisher = self.publisher()
        # Until then, what is emitted waits for who may connect at once.
        publisher.wait_log('served')
        publisher.ask('emit', count=10)     # nobody gets these
        early = self.subscribe()
        publisher.ask('emit', count=10)
        self.assert_complete(early, 10)
        late = self.subscribe()
        publisher.ask('emit', count=10)
        self.assert_complete(early, 20)
        self.assert_complete(late, 10)
        first = [subscriber.messages[0]['payload']['number']
                 for subscriber in (early, late)]
        self.assertEqual([11, 21], first)

    def test_notification_right_after_connect_arrives(self):
        publisher = self.publisher()
        self.subscribe().close()
        self.assertEqual([], publisher.ask('rounds', count=500,
                                           path=self.path))
        # Now that somebody is there all the time.
        subscriber = self.subscribe()
        self.assertEqual([], publisher.ask('rounds', count=500,
                                           path=self.path))
        self.assert_complete(subscriber, 500)

    def test_many_connect_and_notify_at_once(self):
        publisher = self.publisher()
        self.subscribe().close()
        self.assertEqual([], publisher.ask('rounds', count=200, threads=8,
                                           path=self.path))

    def test_subscribers_come_and_go_while_others_listen(self):
        publisher = self.publisher()
        steady = self.subscribe()
        publisher.ask('start', threads=2, size=2000)
        for _ in range(20):
            for subscriber in [self.subscribe() for _ in range(3)]:
                subscriber.wait(1)
                subscriber.close()
        # Flat out: it may lag.
        self.assert_accounted(steady, publisher.ask('stop'))
