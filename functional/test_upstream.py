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


"""The module is what it says it is: parts that stand alone, and a patch.

Guards against a part that needs a later one, and against a module that works
in its own tree only. The installed oslo.messaging is copied to a scratch
tree, patched as UPSTREAM.rst says, and its tests and ours are run there.
"""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import unittest

import fixtures
import oslo_messaging
from oslotest import base
from testtools import content

import unix_notifier

TESTS = os.path.join(os.path.dirname(os.path.dirname(
    os.path.abspath(__file__))), 'test_unix_notifier.py')
MESSAGES = 'functional', 'notifications.ndjson'
BANNER = re.compile(r'^# -{70,}\n# (STREAM|RELAY|CONSUMERS): ', re.M)
PAGE = os.path.join(os.path.dirname(TESTS), 'UPSTREAM.rst')
DRIVERS = '[oslo.messaging.notify.drivers]\n'
TRANSPORTS = '[oslo.messaging.drivers]\n'


def read(*path):
    with open(os.path.join(*path), encoding='utf-8') as file:
        return file.read()


def write(text, *path):
    with open(os.path.join(*path), 'w', encoding='utf-8') as file:
        file.write(text)


def add_messages(directory):
    """What the tests read, beside them."""
    os.mkdir(os.path.join(directory, 'functional'))
    shutil.copy(os.path.join(os.path.dirname(TESTS), *MESSAGES),
                os.path.join(directory, *MESSAGES))


def cut(text, *parts):
    """The text without what follows a banner of another part."""
    for banner in BANNER.finditer(text):
        if banner.group(1) not in parts:
            return text[:banner.start()]
    return text


class ScratchTestCase(base.BaseTestCase):

    # Seconds: it runs other tests.
    DEFAULT_TIMEOUT = 300

    def setUp(self):
        super().setUp()
        self.scratch = self.useFixture(fixtures.TempDir()).path

    def run_tests(self, *names):
        """Run them in the scratch tree; how many there were.

        :raises: AssertionError unless all pass
        """
        done = self.run_python('-m', 'testtools.run', *names)
        summary = re.search(r'^Ran (\d+) tests? .*\n+OK', done, re.M)
        self.assertTrue(summary, done[-2000:])
        return int(summary.group(1))

    def run_python(self, *arguments):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=self.scratch, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240,
            # stevedore keeps what it has found in the home directory.
            env=dict(os.environ, HOME=self.scratch, XDG_CACHE_HOME='',
                     PYTHONPATH=self.scratch))
        self.addDetail('output', content.text_content(done.stdout))
        return done.stdout


class PartsTest(ScratchTestCase):

    def _run_parts(self, *parts):
        """All tests of the parts pass, on these parts."""
        write(cut(read(unix_notifier.__file__), *parts),
              self.scratch, 'unix_notifier.py')
        tests = cut(read(TESTS), *parts)
        write(tests, self.scratch, 'test_unix_notifier.py')
        add_messages(self.scratch)
        self.assertEqual(len(re.findall('    def test_', tests)),
                         self.run_tests('test_unix_notifier'))

    def test_stream_stands_alone(self):
        self._run_parts('STREAM')
        self.assertNotIn('class _Relay:',
                         read(self.scratch, 'unix_notifier.py'))

    def test_page_lists_what_stream_does_not_need(self):
        tree = ast.parse(cut(read(unix_notifier.__file__), 'STREAM'))
        imported = {(each.asname or each.name).partition('.')[0]
                    for node in ast.walk(tree)
                    if isinstance(node, (ast.Import, ast.ImportFrom))
                    for each in node.names}
        listed = re.search('Of the imports it does not need(.*?)[.]\n',
                           read(PAGE), re.S).group(1)
        self.assertEqual(
            imported - {node.id for node in ast.walk(tree)
                        if isinstance(node, ast.Name)},
            set(re.findall('``(.*?)``', listed)))

    def test_stream_with_relay_stands_alone(self):
        self._run_parts('STREAM', 'RELAY')
        text = read(self.scratch, 'unix_notifier.py')
        self.assertIn('class _Relay:', text)
        self.assertNotIn('class _Subscription', text)

    def test_module_has_its_parts_in_order(self):
        self.assertEqual(['STREAM', 'RELAY', 'CONSUMERS'],
                         BANNER.findall(read(unix_notifier.__file__)))


class PatchTest(ScratchTestCase):

    def setUp(self):
        super().setUp()
        source = os.path.dirname(oslo_messaging.__file__)
        if not os.path.isdir(os.path.join(source, 'tests')):
            raise unittest.SkipTest('oslo.messaging came without its tests')
        self.package = os.path.join(self.scratch, 'oslo_messaging')
        shutil.copytree(source, self.package,
                        ignore=shutil.ignore_patterns('__pycache__'))
        self._add_module()
        self._add_options()
        self._add_entry_points()

    def _add_module(self):
        shutil.copy(unix_notifier.__file__, os.path.join(
            self.package, 'notify', '_impl_unix.py'))
        tests = read(TESTS)
        self.assertEqual(1, tests.count('\nimport unix_notifier\n'))
        write(tests.replace(
            '\nimport unix_notifier\n',
            '\nfrom oslo_messaging.notify import _impl_unix as unix_notifier'
            '\n'), self.scratch, 'test_impl_unix.py')
        add_messages(self.scratch)

    def _add_options(self):
        self._replace(
            os.path.join(self.package, 'opts.py'),
            ('from oslo_messaging.notify import notifier\n',
             'from oslo_messaging.notify import _impl_unix\n'
             'from oslo_messaging.notify import notifier\n'),
            ("('oslo_messaging_notifications', notifier._notifier_opts)",
             "('oslo_messaging_notifications', list(itertools.chain(\n"
             "        notifier._notifier_opts, _impl_unix._OPTS)))"))
        self._replace(
            os.path.join(self.package, 'notify', 'notifier.py'),
            ("'routing, log, test, noop'", "'routing, log, unix, test, noop'"))

    def _add_entry_points(self):
        distribution = importlib.metadata.distribution('oslo.messaging')
        info = os.path.join(self.scratch, 'oslo_messaging-%s.dist-info'
                            % distribution.version)
        os.mkdir(info)
        write(distribution.read_text('METADATA'), info, 'METADATA')
        path = os.path.join(info, 'entry_points.txt')
        write(distribution.read_text('entry_points.txt'), path)
        module = 'unix = oslo_messaging.notify._impl_unix:'
        self._replace(
            path, (DRIVERS, DRIVERS + module + 'UnixDriver\n'),
            (TRANSPORTS, TRANSPORTS + module + 'UnixTransportDriver\n'))
        # Comes first, so that the installed one is not seen.
        hidden = os.path.join(self.scratch, 'unix_notifier-0.dist-info')
        os.mkdir(hidden)
        write('Metadata-Version: 2.1\nName: unix-notifier\nVersion: 0\n',
              hidden, 'METADATA')

    def _replace(self, path, *pairs):
        text = read(path)
        for old, new in pairs:
            self.assertEqual(1, text.count(old), old)
            text = text.replace(old, new)
        write(text, path)

    def test_upstream_tests_pass(self):
        if importlib.util.find_spec('confluent_kafka') is None:
            self.skipTest('confluent_kafka is not installed, as one needs')
        names = ['test_opts'] + [
            'notify.' + name.removesuffix('.py') for name in os.listdir(
                os.path.join(self.package, 'tests', 'notify'))
            if name.startswith('test_')]
        self.assertGreater(self.run_tests(*(
            'oslo_messaging.tests.' + name for name in names)), 50)

    def test_our_tests_pass(self):
        # Beside the package of upstream's tests, which patches by eventlet.
        self.assertGreater(self.run_tests('test_impl_unix'), 100)

    def test_it_is_used_and_listed(self):
        write('''
import logging
from oslo_config import cfg
import oslo_messaging
from oslo_messaging import opts
conf = cfg.ConfigOpts()
conf([])
transport = oslo_messaging.get_notification_transport(conf, 'unix:///x')
oslo_messaging.Notifier(transport, driver='unix', topics=['any'])
print(type(transport._driver))
conf.set_override('sock_path', '/nonexistent/x',
                  'oslo_messaging_notifications')
logging.disable()       # of the path that does not exist
notifier = oslo_messaging.Notifier(transport, driver='unix', topics=['any'])
print(*(type(each.obj) for each in notifier._driver_mgr))
print(*(opt.name for opt in dict(opts.list_opts())[
    'oslo_messaging_notifications']))
''', self.scratch, 'use.py')
        output = self.run_python('-W', 'ignore', 'use.py')
        for text in ("<class 'oslo_messaging.notify._impl_unix.UnixDriver'>",
                     'notify._impl_unix.UnixTransportDriver',
                     'driver transport_url topics retry sock_path sock_mode'):
            self.assertIn(text, output)
        self.assertIn('usage: ', self.run_python(
            '-W', 'ignore', '-m', 'oslo_messaging.notify._impl_unix',
            '--help'))
