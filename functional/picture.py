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

"""Draw what the command prints at a terminal, from a real run: an SVG file.

    picture.py [FILE]

A service emits notifications of notifications.ndjson, floods the command while
that one is stopped, so that some are lost, and is replaced by another, which
interrupts the stream. The command runs in a terminal of 120 columns; of what
it wrote, the name of the scratch directory is replaced. Nothing is needed but
the module.
"""

import contextlib
import html
import itertools
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
NOTIFICATIONS = os.path.join(HERE, 'notifications.ndjson')
CONFIG = """\
[DEFAULT]
transport_url = fake://

[oslo_messaging_notifications]
driver = unix
sock_path = %s
# The least that can be had: what the flood takes.
sock_buffer_size = 65536
"""
FILTER = '^(identity|baremetal)[.]'
# Shown for the scratch directory.
DIRECTORY = '/run/openstack'

# Seconds that a step may take.
PATIENCE = 20
COLUMNS = 120

# Pixels, of a font of 14 whose characters are 0.6 as wide as high.
CELL = 8.4
LINE = 18
MARGIN = 12

BACKGROUND, FOREGROUND, DIM = '#1c1f26', '#d7dae0', '#868c98'
COLOURS = {'31': '#ff6c6b', '32': '#98be65', '33': '#ecbe7b', '36': '#46d9ff',
           '37': '#ffffff'}


# -- the service ------------------------------------------------------------

def serve(config_file):
    """Emit what stdin names: event types, how often, with which priority."""
    # Here, since who draws has no need of them.
    from oslo_config import cfg
    import oslo_messaging

    conf = cfg.ConfigOpts()
    conf([], project='picture', default_config_files=[config_file])
    notifier = oslo_messaging.Notifier(
        oslo_messaging.get_notification_transport(conf))
    with open(NOTIFICATIONS) as lines:
        messages = list(map(json.loads, lines))
    for line in sys.stdin:
        event_types, times, priority = json.loads(line)
        wanted = [next(each for each in messages
                       if re.fullmatch(event_type, each['event_type']))
                  for event_type in event_types]
        for each in itertools.chain.from_iterable([wanted] * times):
            emitter = notifier.prepare(publisher_id=each['publisher_id'])
            getattr(emitter, priority)({}, each['event_type'],
                                       each['payload'])


class Service:
    def __init__(self, config_file):
        self._process = subprocess.Popen(
            [sys.executable, '-W', 'ignore', __file__, 'serve', config_file],
            stdin=subprocess.PIPE, text=True)

    def emit(self, *event_types, times=1, priority='info'):
        self._process.stdin.write(
            json.dumps([event_types, times, priority]) + '\n')
        self._process.stdin.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self._process.kill()
        self._process.communicate()


# -- the run ----------------------------------------------------------------

class Terminal:
    """The command in a terminal, and all that it writes there."""

    def __init__(self, *arguments):
        self.written = ''
        self._end, output = pty.openpty()
        termios.tcsetwinsize(output, (40, COLUMNS))
        env = {key: value for key, value in os.environ.items()
               if key not in ('NO_COLOR', 'COLUMNS')}
        self._process = subprocess.Popen(
            [sys.executable, '-m', 'unix_notifier', *arguments],
            stdin=output, stdout=output, stderr=output,
            start_new_session=True, env=dict(env, TERM='xterm'))
        os.close(output)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        data = b''
        with contextlib.suppress(OSError):      # nobody has it open any more
            while True:
                data += os.read(self._end, 65536)
                self.written = data.decode(errors='replace')

    def wait(self, pattern, times=1):
        deadline = time.monotonic() + PATIENCE
        while len(re.findall(pattern, self.written)) < times:
            if time.monotonic() > deadline:
                raise TimeoutError('no %r in %s' % (pattern, self.written))
            time.sleep(0.01)

    def signal(self, number):
        self._process.send_signal(number)

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self._process.kill()
        self._process.wait()
        self._reader.join()
        os.close(self._end)


def run(directory):
    """What a terminal shows of it."""
    path = os.path.join(directory, 'notifications.sock')
    config_file = os.path.join(directory, 'service.conf')
    with open(config_file, 'w') as file:
        file.write(CONFIG % path)
    with Terminal('--event-type', FILTER, path) as terminal:
        terminal.wait('waiting for it')
        with Service(config_file) as service:
            terminal.wait('-- connected')
            service.emit('identity.user.created', 'identity.authenticate',
                         'baremetal.node.provision_set.start',
                         'baremetal.port.create.end')
            terminal.wait('port.create.end')
            terminal.signal(signal.SIGSTOP)
            service.emit('image.*', times=2000)
            service.emit('identity.project.updated')
            time.sleep(1)       # nothing tells that all of it was emitted
            terminal.signal(signal.SIGCONT)
            terminal.wait('project.updated')
            service.emit('baremetal.node.provision_set.end', priority='error')
            service.emit('identity.user.updated', priority='warn')
            terminal.wait('user.updated')
        terminal.wait('disconnected')
        with Service(config_file) as service:
            terminal.wait('interrupted')
            service.emit('baremetal.node.maintenance_set.start',
                         'baremetal.node.maintenance_set.end',
                         'identity.project.deleted')
            terminal.wait('project.deleted')
            return terminal.written.replace(directory, DIRECTORY)


# -- the picture ------------------------------------------------------------

def spans(line):
    """What to write in which column, by which codes of SGR."""
    column, codes = 0, ()
    for escape, text in re.findall('(?:\x1b\\[([\\d;]*)m)|([^\x1b]+)', line):
        if text:
            # Word by word, and each as wide as it has to be, for the font is
            # whatever the reader has.
            for word in re.finditer('.+' if '7' in codes else r'\S+', text):
                yield column + word.start(), word.group(), codes
            column += len(text)
        else:
            codes = tuple(filter(None, escape.split(';')))


def element(row, column, text, codes):
    x, y = MARGIN + CELL * column, MARGIN + LINE * row
    width = CELL * len(text)
    colour = next((COLOURS[each] for each in codes if each in COLOURS),
                  DIM if '2' in codes else FOREGROUND)
    back = ''
    if '7' in codes:
        back = '<rect x="%.1f" y="%d" width="%.1f" height="%d" fill="%s"/>' % (
            x, y, width, LINE, colour)
        colour = BACKGROUND
    weight = ' font-weight="bold"' if '1' in codes else ''
    return back + (
        '<text x="%.1f" y="%d" textLength="%.1f" fill="%s"%s>%s</text>' % (
            x, y + 14, width, colour, weight, html.escape(text)))


def svg(text):
    lines = text.splitlines()
    yield ('<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" '
           'font-family="monospace" font-size="14" xml:space="preserve">' % (
               2 * MARGIN + CELL * COLUMNS, 2 * MARGIN + LINE * len(lines)))
    yield '<rect width="100%%" height="100%%" rx="6" fill="%s"/>' % BACKGROUND
    for row, line in enumerate(lines):
        for span in spans(line):
            yield element(row, *span)
    yield '</svg>'


def draw(path):
    with tempfile.TemporaryDirectory(prefix='picture-') as directory:
        written = run(directory)
    prompt = "$ unix-notifier --event-type '%s' %s/notifications.sock\n" % (
        FILTER, DIRECTORY)
    with open(path, 'w') as file:
        file.write('\n'.join(svg(prompt + written)) + '\n')


if __name__ == '__main__':
    if sys.argv[1:2] == ['serve']:
        serve(sys.argv[2])
    else:
        draw(*sys.argv[1:] or [os.path.join(HERE, 'terminal.svg')])
