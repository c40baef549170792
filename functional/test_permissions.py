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

"""The file system decides who may subscribe.

Guards against a moment at which the wrong people get in, against a change of
the umask, which the whole process shares, and against root taking over a
directory of a service: a probe between bind() and chmod() would connect, a
file's mode would be other than configured, a user without rights would be
let in, or a file of root would appear where only the service may create any.
"""

import errno
import os
import stat
import subprocess
import sys

import base

# Becomes a user, connects, and exits with the errno, or 0.
CONNECT = """
import os, socket, sys
path, uid, gid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.setgroups([])
os.setgid(gid)
os.setuid(uid)
sys.exit(socket.socket(socket.AF_UNIX).connect_ex(path))
"""


def mode(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


class ModeTest(base.FunctionalTestCase):

    def test_mode_is_as_configured_whatever_the_umask(self):
        cases = ((0o077, '', 0o660), (0o000, '0600', 0o600),
                 (0o027, '0666', 0o666))
        publishers = self.publishers(*(
            dict({'mode': text} if text else {}, umask=umask,
                 path='%s%o' % (self.path, umask))
            for umask, text, _ in cases))
        for publisher, (umask, _, expected) in zip(publishers, cases):
            line = publisher.wait_log('served')
            path = '%s%o' % (self.path, umask)
            self.assertEqual(expected, mode(path))
            self.assertEqual(0o600, mode(path + '.lock'))
            self.assertEqual('%04o' % umask,
                             base.status(publisher.pid)['Umask'])
            self.assertIn('mode %04o' % expected, line)

    def test_nobody_gets_in_before_mode_and_group_are_set(self):
        publisher = self.publisher(is_open=False, umask=0o027, mode='0600',
                                   group='%d' % os.getgid())
        publisher.ask('probe', path=self.path)
        publisher.ask('open')
        publisher.wait_log('served')
        self.assertEqual([['socket.bind', 'ENOENT', '0027'],
                          ['os.chown', 'ECONNREFUSED', '0027'],
                          ['os.chmod', 'ECONNREFUSED', '0027']],
                         publisher.ask('probed'))
        self.subscribe()


class RootTest(base.FunctionalTestCase):

    def setUp(self):
        super().setUp()
        if os.getuid() != 0:
            self.skipTest('needs root, to be several users')
        self.run_directory = os.path.dirname(self.path)

    def _connect(self, path, uid, gid):
        """What happens: OK, or the name of the error."""
        code = subprocess.call([sys.executable, '-S', '-E', '-c', CONNECT,
                                path, '%d' % uid, '%d' % gid])
        return errno.errorcode.get(code, 'OK')

    def test_who_may_connect(self):
        os.chmod(self.run_directory, 0o711)
        group = 1   # any but root's and nobody's
        cases = (('0600', 'EACCES', 'EACCES'), ('0660', 'OK', 'EACCES'),
                 ('0640', 'EACCES', 'EACCES'), ('0666', 'OK', 'OK'))
        publishers = self.publishers(*(
            {'path': self.path + text, 'mode': text, 'group': group}
            for text, _, _ in cases))
        for publisher, (text, *expected) in zip(publishers, cases):
            publisher.wait_log('served')
            path = self.path + text
            self.assertEqual(group, os.lstat(path).st_gid)
            self.assertEqual(expected, [
                self._connect(path, base.NOBODY, group),
                self._connect(path, base.NOBODY, base.NOBODY)], text)
        # The log names the user.
        publishers[-1].wait_log('uid %d' % base.NOBODY)
        self.assertEqual([], publishers[-1].log('uid 0'))

    def test_root_leaves_a_directory_of_another_user_alone(self):
        os.chown(self.run_directory, base.NOBODY, base.NOBODY)
        publisher = self.publisher()
        self.assertIn('uid %d' % base.NOBODY, publisher.wait_log('WARNING'))
        publisher.ask('emit', count=10)
        self.assert_never(lambda: os.listdir(self.run_directory),
                          'root created a file')
        self.assertEqual(1, len(publisher.troubles()))
        # The service finds nothing in its way.
        service = self.publisher(uid=base.NOBODY)
        subscriber = self.subscribe()
        service.ask('emit', count=10)
        self.assert_complete(subscriber, 10)
        self.assertEqual({base.NOBODY},
                         {os.lstat(os.path.join(self.run_directory, name))
                          .st_uid for name in os.listdir(self.run_directory)})
        self.assertEqual([], service.troubles())
        publisher.tell('leave')
        publisher.wait_exit()
        self.assertTrue(os.path.exists(self.path))

    def test_directory_that_the_service_may_not_write_to(self):
        publisher = self.publisher(uid=base.NOBODY)
        self.assertIn(self.path, publisher.wait_log('WARNING'))
        publisher.ask('emit', count=10)
        self.assertEqual([], os.listdir(self.run_directory))
        os.chown(self.run_directory, base.NOBODY, base.NOBODY)
        subscriber = self.subscribe()
        publisher.ask('emit', count=10)
        self.assert_complete(subscriber, 10)
        publisher.wait_log('all is well again')
        self.assertEqual(2, len(publisher.troubles()))
