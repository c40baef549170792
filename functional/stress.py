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

"""A stress: threads meet wherever the driver does without a lock.

    stress.py [--seconds N]

Two processes emit on one path, eight threads in each, flat out but for a tiny
pause now and then: the queue is full, or empty, or about to be either, and
one of the two, which follows, sends as it emits. Three subscribers last, three
others come and go. It is meant for an interpreter without the GIL, where each
step runs beside any other: see PYTHON_GIL, for an extension may turn it on.

Numbers of a thread have to rise, so that nothing comes twice; where some are
left out, as many must have been reported lost in between. At the end, for each
who lasts, emitted = received + sum of ``lost``, exactly; for who comes and
goes, of what follows the first that it got of a thread no more is missing than
was reported. What hangs has all stacks printed, and fails.
"""

import argparse
import collections
import faulthandler
import os
import random
import shutil
import sys
import tempfile
import threading
import time

import base
import publisher

# Small, so that much is lost: by the queue, the relay and who reads.
OPTIONS = {'buffer_size': 64 * 1024}
WORKERS = 2
THREADS = 8     # of each, which emit
READERS = 3     # that last, and as many that come and go
# Notifications of a thread in a row, as a power of ten, at most; seconds from
# one row to the next, likewise, and that a visit takes; bytes of padding.
ROW = 2.5
PAUSE = 0.05
VISIT = 0.05
SIZES = 0, 50, 500, 3000


class Service(publisher.Service):

    """The process that emits."""

    def rush(self):
        """Emit without end, until ``stop``; returns whether there is a GIL."""
        def run(index):
            choose = random.Random(index)
            while not self.stopping.is_set():
                self._emit(index, range(int(10 ** choose.uniform(0, ROW))),
                           choose.choice(SIZES))
                time.sleep(choose.uniform(0, PAUSE))

        self.background += [
            threading.Thread(target=run, args=(index,), daemon=True)
            for index in range(THREADS)]
        for thread in self.background:
            thread.start()
        return getattr(sys, '_is_gil_enabled', lambda: True)()

    def halt(self):
        """End that; returns how many each thread has emitted."""
        self.stop()
        return self.numbers


class Reader(base.SocketSubscriber):

    """A subscriber that keeps books on each thread that emits."""

    def __init__(self, path, lasts=False):
        super().__init__(path)
        self.lasts = lasts
        self.owed = collections.Counter()   # the first number, less one
        self.heard = collections.Counter()  # how many
        self.go()

    def _follow(self, source, number):
        if source not in self._sources:
            first = 0 if self.lasts else number - 1
            self._sources[source] = first, 0 if self.lasts else self.lost
            self.owed[source] = first
        super()._follow(source, number)
        self.heard[source] += 1
        # All that rises has come once: what is kept for that is not needed.
        self.messages.clear()
        self._ids.clear()

    def check(self, numbers=None):
        """Close it; what is wrong. It lasted, if it is given the numbers."""
        self.close()
        last = numbers or {
            source: number for source, (number, _) in self._sources.items()}
        missing = sum(number - self.owed[source] - self.heard[source]
                      for source, number in last.items())
        if self.lost < missing or numbers and self.lost > missing:
            self.problems.append('%d are missing, %d were reported lost' % (
                missing, self.lost))
        return ['%s: %s' % (self, each) for each in self.problems[:5]]


class Stress:

    def __init__(self):
        self.directory = tempfile.mkdtemp(prefix='un-', dir='/tmp')
        self.path = os.path.join(self.directory, 's')
        self.workers = [base.Publisher(
            self.directory, dict(OPTIONS, path=self.path),
            program=(os.path.abspath(__file__), 'publish'))
            for _ in range(WORKERS)]
        self.stopping = threading.Event()
        self.visits = collections.Counter()
        self.problems = []

    def come_and_go(self):
        try:
            while not self.stopping.is_set():
                reader = Reader(self.path)
                time.sleep(random.uniform(0, VISIT))
                self.problems += reader.check()
                self.visits.update(visits=1, received=reader.received,
                                   lost=reader.lost)
        except Exception as error:
            self.problems.append(repr(error))

    def run(self, seconds):
        for worker in self.workers:
            worker.ask('open')
        lasting = [Reader(self.path, lasts=True) for _ in range(READERS)]
        others = [threading.Thread(target=self.come_and_go, daemon=True)
                  for _ in range(READERS)]
        for thread in others:
            thread.start()
        print(sys.version, '\nthe GIL is on:', [
            worker.ask('rush') for worker in self.workers], flush=True)
        time.sleep(seconds)
        numbers = {}
        for worker in self.workers:
            numbers.update(worker.ask('halt'))
        self.stopping.set()
        for thread in others:
            thread.join()
        for reader in lasting:
            reader.wait(sum(numbers.values()))
        # Who leaves says all that it has to say, and ends the stream.
        for worker in self.workers:
            worker.tell('leave')
            if worker.wait_exit():
                self.problems.append('%d failed' % worker.pid)
            self.problems += worker.log('ERROR') + worker.log('Traceback')
        for reader in lasting:
            reader.wait_end()
            self.problems += reader.check(numbers)
            print('emitted %d, received %d, lost %d: %s' % (
                sum(numbers.values()), reader.received, reader.lost,
                dict(collections.Counter(reader.reasons))))
        print('came and went: %s' % dict(self.visits))

    def close(self):
        for worker in self.workers:
            worker.close()
        shutil.rmtree(self.directory)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--seconds', type=float, default=60)
    arguments = parser.parse_args()
    faulthandler.dump_traceback_later(
        arguments.seconds + 4 * base.PATIENCE, exit=True)
    stress = Stress()
    try:
        stress.run(arguments.seconds)
    except AssertionError as error:
        stress.problems.append(error)
    finally:
        stress.close()
    for problem in stress.problems[:20]:
        print('WRONG: %.500s' % problem)
    return bool(stress.problems)


if __name__ == '__main__':
    if sys.argv[1:2] == ['publish']:
        del sys.argv[1]
        sys.exit(publisher.main(Service))
    sys.exit(main())
