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

"""Show the driver at work, with two processes and real notifications.

One process is a service: it reads a configuration file and emits the
notifications of notifications.ndjson through an oslo.messaging Notifier. The
other is a subscriber: it connects to the socket and prints what arrives. The
exit code is 0 if everything did.
"""

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time

# Seconds that a step may take before the demonstration gives up.
PATIENCE = 10
NOTIFICATIONS = os.path.join(os.path.dirname(os.path.abspath(__file__)),
                             'notifications.ndjson')
CONFIG = """\
[DEFAULT]
# No message broker takes part.
transport_url = fake://

[oslo_messaging_notifications]
driver = unix
sock_path = %s
"""
INTRODUCTION = """\
A service is configured by %(config_file)s:

%(config)s
Any process may subscribe, in a shell for example by

    nc -U %(path)s

Here a few lines of plain Python do it, and print each notification's time,
priority, event type and publisher.
"""


def serve(config_file):
    """Be the service: emit the notifications as soon as stdin is closed."""
    # Here, since the subscriber has no need of them.
    from oslo_config import cfg
    import oslo_messaging

    logging.basicConfig(format='service: %(message)s')
    logging.getLogger('unix_notifier').setLevel(logging.INFO)
    conf = cfg.ConfigOpts()
    conf([], project='demo', default_config_files=[config_file])
    notifier = oslo_messaging.Notifier(
        oslo_messaging.get_notification_transport(conf))
    sys.stdin.read()
    with open(NOTIFICATIONS) as lines:
        for n in map(json.loads, lines):
            emit = getattr(notifier.prepare(publisher_id=n['publisher_id']),
                           n['priority'].lower())
            emit({}, n['event_type'], n['payload'])


def subscribe(path):
    """Be the subscriber: print a line for each notification that comes."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            sock.connect(path)
            break
        except OSError:  # the service is still on its way up
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    print('subscriber: connected', flush=True)
    for line in sock.makefile():
        n = json.loads(line)
        print('%-12.12s %-5s %-36s %s' % (
            n['timestamp'].split()[1], n['priority'], n['event_type'],
            n['publisher_id']), flush=True)


def start(role, argument, **pipes):
    # Importing oslo.messaging brings a page of warnings of other libraries.
    return subprocess.Popen([sys.executable, '-W', 'ignore', __file__, role,
                             argument], text=True, **pipes)


def run(directory):
    path = os.path.join(directory, 'notifications.sock')
    config_file = os.path.join(directory, 'service.conf')
    config = CONFIG % path
    with open(config_file, 'w') as f:
        f.write(config)
    print(INTRODUCTION % {'config_file': config_file, 'config': config,
                          'path': path}, flush=True)
    with (start('serve', config_file, stdin=subprocess.PIPE) as service,
          start('subscribe', path, stdout=subprocess.PIPE) as subscriber):
        try:
            # Nothing is kept for latecomers, so the service has to wait for
            # the first line, which says that the subscriber is connected.
            print(subscriber.stdout.readline(), end='', flush=True)
            service.stdin.close()
            count = 0
            for line in subscriber.stdout:
                print(line, end='', flush=True)
                # The driver's own records, such as of losses, do not count.
                count += ' notifications.' not in line
            failed = (subscriber.wait(PATIENCE), service.wait(PATIENCE))
        finally:
            subscriber.kill()
            service.kill()
    with open(NOTIFICATIONS) as lines:
        total = sum(1 for _ in lines)
    print('\n%d of %d notifications arrived.' % (count, total))
    return any(failed) or count != total


if __name__ == '__main__':
    if sys.argv[1:]:
        {'serve': serve, 'subscribe': subscribe}[sys.argv[1]](sys.argv[2])
    else:
        with tempfile.TemporaryDirectory(prefix='demo-') as tmp:
            sys.exit(run(tmp))
