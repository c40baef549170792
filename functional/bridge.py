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


"""Where one host is not enough: pass on what a socket gives to a broker.

    bridge.py PATH TRANSPORT_URL

Notifications keep their message_ids. Whatever oslo.messaging speaks will do
as transport; its driver messagingv2 says what happens when it is down: with
retry=-1 this waits, and the socket's service counts what is lost meanwhile.
"""

import sys

from oslo_config import cfg
import oslo_messaging
from oslo_messaging.notify import messaging

import unix_notifier


def bridge(path, url, topics=('notifications',)):
    conf = cfg.ConfigOpts()
    conf([])
    transport = oslo_messaging.get_notification_transport(conf, url=url)
    driver = messaging.MessagingV2Driver(
        conf, topics=topics, transport=transport)
    for message in unix_notifier.subscribe(path):
        driver.topics = message.pop('topics', topics)
        driver.notify(message.pop('context', {}), message,
                      message['priority'].lower(), retry=-1)


if __name__ == '__main__':
    bridge(*sys.argv[1:])
