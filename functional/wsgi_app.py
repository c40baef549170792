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

"""A WSGI application that emits a notification for each request.

As real services do, it makes several Notifiers (with a driver each) when it
is imported: wherever the server does that, in a worker or in the process
that the workers are forked from; or, with WSGI_APP_LAZY in the environment, at
the first request. WSGI_APP_CONFIG there names the configuration file. The
response tells what was emitted, in JSON: [source, number]; or null, if a mule
of uWSGI was told to emit it.
"""

import collections
import json
import logging
import os
import sys
import threading
import time
import uuid

if os.environ.get('WSGI_APP_PATCHED'):
    import eventlet  # noqa: H905
    eventlet.monkey_patch()

from oslo_config import cfg  # noqa: E402
import oslo_messaging  # noqa: E402

logging.basicConfig(level=logging.INFO, stream=sys.stderr,
                    format='%(process)d %(levelname)s %(name)s %(message)s')

conf = cfg.ConfigOpts()
conf(['--config-file', os.environ['WSGI_APP_CONFIG']], project='wsgi_app')
transport = oslo_messaging.get_notification_transport(conf)
notifiers = []
numbers = collections.Counter()
# What tells two interpreters in one process.
interpreter = uuid.uuid4().hex


def make_notifiers():
    notifiers.extend(
        oslo_messaging.Notifier(transport, publisher_id='wsgi_app')
        for _ in range(14))


def emit():
    """Emit a notification; tell its source and number."""
    if not notifiers:
        make_notifiers()
    source = '%d/%s/%d' % (os.getpid(), interpreter, threading.get_ident())
    number = numbers[source] = numbers[source] + 1
    notifiers[number % len(notifiers)].info({}, 'test.event', {
        'source': source, 'number': number,
        'pad': 'x' * int(os.environ.get('WSGI_APP_PAD', 0))})
    return source, number


def application(environ, start_response):
    if environ['PATH_INFO'] == '/mule':
        import uwsgi
        emitted = uwsgi.mule_msg(b'emit')
    else:
        time.sleep(0)       # green threads have a turn, if there are any
        emitted = emit()
    body = json.dumps(emitted).encode('ascii')
    start_response('200 OK', [('Content-Type', 'application/json'),
                              ('Content-Length', str(len(body)))])
    return [body]


if not os.environ.get('WSGI_APP_LAZY'):
    make_notifiers()


def be_mule():
    """Emit as often as told."""
    import uwsgi
    while uwsgi.mule_get_msg():
        emit()
