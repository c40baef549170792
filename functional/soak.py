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

"""A soak: processes, subscribers and the path are ill-treated for long.

    soak.py [--seconds N] [--seed N]

Several processes emit without end on one path, and subscribers read. Again
and again something is done to them, in an order that follows from the seed:
see ACTIONS. After some actions comes a settlement: all that was stopped goes
on, all threads pause, everything is read, and the books must balance. The
first violation of a promise ends the run with an account of it.

What is checked all along: every line is strict JSON and a whole notification;
numbers of a publishing thread rise, within a connection and from one
connection of a reader to the next, hence nothing comes twice; where some are
left out that are owed, as many were reported lost in between. A connection
ends only if the reader, or what was done to the leader or to the path, ended
it. After each fault a new subscriber hears every thread within HEAL seconds.
At the settlements: the books, the memory and the descriptors of each process,
no process that ended by itself, no call that was blocked, of which a process
that leaves in good order is asked before.

The books. All threads number what they emit. The number that each has begun
stands in memory that outlives the process. For a connection there are

- ``base``: for each thread, what it had begun by the time that connect() had
  returned. What comes later must be received or reported as lost.
- ``low``: what it had begun by the last settlement. What came later may have
  been on its way at connect(), and may come, or be lost, on top.
- ``end``: what it has begun by the settlement.

With missing(a, b), the numbers above a and up to b that were not received,

    missing(base, end) <= sum of ``lost`` <= missing(low, end)

For who is connected from one settlement to the next, base and low are the
same, so this is an equation. It is weaker where nothing more is promised:

- A thread of a process that was killed (SIGKILL, or SIGTERM without a
  handler), left by os._exit, or took 0.1 s and more to leave: on the left
  side, what comes after its last number that was received is not missing.
- When the leader is killed, it takes along what it had taken from others.
  The connections of all who have connected by then end, also of those who
  were not yet accepted; nothing is weakened for who goes on. One that leaves
  in good order, and has handed on, ends no connection, but for one whose heir
  is killed as it becomes that.
- When the directory, or lock and socket at once, were removed, a process
  that starts has no way to tell that there is a leader. Until all have found
  to each other there may be two of them, or no way to reach the one. The
  base is set anew when a new subscriber hears all; who connects until then,
  which may be to one of two, has none.
- A connection that has ended: the right side alone.

To stop a process, a leader as well, to kill followers, to remove any single
file, and to leave in good order weakens nothing.

A call of notify() that takes longer than SLOW is looked into. The time that
the thread neither ran nor was ready to run, as the kernel tells, is what it
waited. While it waited for the GIL another thread of the process had that,
and ran or was ready to run. Less the time that others did, and the time that
the process was stopped, or a thread that looks after all this every 10 ms
was late, it must not have waited for more than SLOW. What the machine is
short of weakens the check, and should not break it.
"""

import argparse
import bisect
import collections
import contextlib
import ctypes
import functools
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import base
import soak_publisher as shared

SOAK_PUBLISHER = os.path.join(os.path.dirname(os.path.abspath(__file__)),
                              'soak_publisher.py')
# Small, so that much is lost.
OPTIONS = {'buffer_size': 64 * 1024}
# Bytes that a process may grow by: its buffer, what the allocator makes of
# lines of 300 KB, and as much again to be on the safe side.
GROWTH = 8 * base.MIB
# Descriptors that a leader has and one that just came has not: lock, listener,
# relay, presence and reserve. One that is silent may have had no uplink, or
# none for now, when it was counted, for nobody waits to hear from it.
ROLE = 5
WORKERS = 4
READERS = 3     # those that stay; others come and go
CROWD = 4       # how many more there may be of either
THREADS = 0, 2, 2, 3    # that emit, in a process; who leads may be silent
PAUSE = 0.01    # seconds between two notifications of a thread
ACTIONS_TO_SETTLEMENT = 16
LAST_WORDS = 1, 5, 20   # notifications
# Seconds. A path is looked after once a second, and a retry may take one.
HEAL = 4
# Seconds that it may take to read what comes before the end of the stream.
READ = 1

# Connects and goes for a second, and tells how often.
FLOOD = """
import socket, sys, time
count, end = 0, time.monotonic() + 1
while time.monotonic() < end:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        count += not sock.connect_ex(sys.argv[1])
print(count)
"""
# On who comes and goes, in that time: one a second of each who leads.
LOG_LINES = 10

# How often each is done. Those in ROUGH end connections of others; every
# other time, until a settlement, there are none, for exact books.
ACTIONS = {
    'join': 3, 'join_by_program': 2, 'part': 2, 'stall': 4, 'half_close': 2,
    'kill_program': 2, 'knock': 1, 'flood': 1, 'talk': 1, 'rush': 2,
    'kill_leader': 3, 'kill_leader_awaited': 3, 'kill_leader_flat_out': 2,
    'leave_leader': 3, 'leave_leader_without_heir': 2, 'stop_leader': 3,
    'kill_follower': 2, 'leave_follower': 2, 'stop_follower': 2,
    'fork': 6, 'fork_to_stay': 2,
    'remove_socket': 1, 'remove_relay': 1, 'remove_lock': 1,
    'remove_all': 1, 'remove_directory': 1,
}
ROUGH = {'kill_leader', 'kill_leader_awaited', 'kill_leader_flat_out',
         'leave_leader_without_heir', 'remove_all', 'remove_directory'}

PR_SET_CHILD_SUBREAPER = 36


class Violation(Exception):

    """A promise was not kept."""


# -- the books --------------------------------------------------------------

def overlap(first, last, low, high):
    """How many of first to last are above low and at most high."""
    return max(0, min(last, high) - max(first, low + 1) + 1)


def at(numbers, slot):
    """The number of a slot, in a list that may be older than the slot.

    Without a list, nothing is owed.
    """
    if numbers is None:
        return math.inf
    return numbers[slot] if slot < len(numbers) else 0


class Ledger(base.Account):

    """What one connection got, and what it is owed."""

    def __init__(self, who, last=()):
        """Note nothing yet.

        :param last: the last numbers that the same reader got before
        """
        super().__init__()
        self.who = who
        self.last = dict(last)
        self.may_end = False    # the reader sees to that
        self.begin([], [])

    def begin(self, low, base):
        """Open the books; see the module's docstring."""
        self.low, self.base = low, base
        self.heard = {}         # slot: [first, last, ranges in between]
        self.before = self.lost
        # All that rises has come once: what is kept for that is not needed.
        self.messages.clear()
        self._ids.clear()

    def owe_from(self, numbers):
        """Set the base anew."""
        self.base = numbers

    def _follow(self, source, number):
        slot = int(source)
        if number <= self.last.get(slot, 0):
            raise ValueError('comes after number %d' % self.last[slot])
        # The first is owed as well, and so is what comes before it.
        self._sources.setdefault(
            source, (min(at(self.base, slot), number - 1), self.before))
        super()._follow(source, number)
        self.last[slot] = number
        heard = self.heard.setdefault(slot, [number, number - 1, []])
        if number > heard[1] + 1:
            heard[2].append((heard[1] + 1, number - 1))
        heard[1] = number

    def _owed_after(self, source, last):
        # What was begun before connect() may have found nobody, though what
        # came before it was still on its way, and was received.
        return max(last, at(self.base, int(source)))

    def missing(self, slot, low, high):
        if high <= low:
            return 0
        first, last, holes = self.heard.get(slot, (1, 0, ()))
        begin = bisect.bisect_left(holes, (low,))
        return high - low - overlap(first, last, low, high) + sum(
            overlap(*hole, low, high) for hole in holes[begin:])

    def owed(self, end, cut):
        """How many must be reported lost at least, by slot.

        :param cut: slots of processes that could not hand all on
        """
        owed = {}
        for slot in range(1, len(end)):
            high = end[slot]
            if slot in cut:
                high = min(high, self.last.get(slot, 0))
            missing = self.missing(slot, at(self.base, slot), high)
            if missing:
                owed[slot] = missing
        return owed

    def reported(self):
        return self.lost - self.before

    def settled(self, end, cut):
        """Whether nothing is missing any more that was not reported."""
        return sum(self.owed(end, cut).values()) <= self.reported()

    def check(self, end, cut, ended=False):
        """Balance the books.

        :raises: Violation
        """
        for slot, last in self.last.items():
            if last > at(end, slot):
                raise Violation('%s: %d of thread %d was never emitted' % (
                    self.who, last, slot))
        owed = {} if ended else self.owed(end, cut)
        limit = sum(self.missing(slot, at(self.low, slot), end[slot])
                    for slot in range(1, len(end)))
        if not sum(owed.values()) <= self.reported() <= limit:
            raise Violation(
                '%s: %d reported lost %r, but at least %d and at most %d are '
                'missing: of threads %r' % (
                    self.who, self.reported(), collections.Counter(
                        self.reasons), sum(owed.values()), limit, owed))


# -- subscribers ------------------------------------------------------------

class Reader:

    """A subscriber that connects again whenever it was cut off."""

    def __init__(self, soak, name, by_program=False):
        self.soak = soak
        self.name = name
        self.by_program = by_program    # which reads, and can be killed
        self.program = None
        self.sock = None
        self.ledger = None
        self.connects = 0
        self.last = {}
        self.stalled = None     # since when, since the last settlement
        self.closing = False
        self.reading = threading.Event()
        self.reading.set()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def __str__(self):
        return self.name

    def _run(self):
        while not self.closing:
            with socket.socket(socket.AF_UNIX) as sock:
                try:
                    sock.connect(self.soak.path)
                except (FileNotFoundError, ConnectionRefusedError):
                    time.sleep(0.005)
                    continue
                self.sock = sock
                self._begin()
                self._read(sock)
            self._end()

    def _begin(self):
        self.connects += 1
        ledger = Ledger('%s, connection %d' % (self, self.connects),
                        self.last)
        with self.soak.lock:    # for base may be set anew
            ledger.begin(self.soak.low, None if self.soak.two_leaders
                         else self.soak.began())
            self.ledger = ledger

    def _read(self, sock):
        receive = functools.partial(sock.recv, 65536)
        if self.by_program:
            self.program = subprocess.Popen(
                ['cat'], stdin=sock, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, start_new_session=True)
            sock.close()    # or it would outlive the program
            receive = functools.partial(
                os.read, self.program.stdout.fileno(), 65536)
        with contextlib.suppress(OSError):
            while data := self.reading.wait() and receive():
                self.ledger.feed(data)

    def _end(self):
        if self.program is not None:
            self.program.kill()
            self.program.wait()
            self.program.stdout.close()
            self.program = None
        with self.soak.lock:
            ledger, self.ledger = self.ledger, None
            self.last = ledger.last
            now = time.monotonic()
            self.soak.ended.append((self.stalled or now, now, ledger))

    def last_of(self, slot):
        ledger = self.ledger
        return ledger and ledger.last.get(slot)

    def let_end(self):
        """The present connection may end. Whether there is one."""
        ledger = self.ledger
        if ledger is not None:
            ledger.may_end = True
        return ledger is not None

    def kill(self):
        """Kill the program; it is started again."""
        program = self.program
        if self.let_end() and program is not None:
            program.kill()

    def renew(self):
        """Connect anew. Whether that comes about, as is to be expected."""
        before, deadline = self.connects, time.monotonic() + HEAL
        while time.monotonic() < deadline:
            if self.connects > before:
                return True
            self._disconnect()
            time.sleep(0.005)
        return False    # there are too many who wait

    def half_close(self):
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def talk(self):
        """Send more than anybody listens to, which ends the connection."""
        with contextlib.suppress(OSError):
            if self.let_end():
                self.sock.send(bytes(70000), socket.MSG_DONTWAIT)

    def _disconnect(self):
        self.kill()
        self.reading.set()
        if self.sock is not None and not self.by_program:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.closing = True
        self._disconnect()
        self.thread.join(base.PATIENCE)


# -- processes --------------------------------------------------------------

class Process:

    """A process that emits, and what is to be known of it."""

    def __init__(self, name, child, parent):
        self.name = name
        self.child = child
        self.pid = child.pid
        self.parent = parent    # None: the one that only forks
        self.slots = []         # of threads that emit without end
        self.stopped = False
        self.stops = []         # [from, to]
        self.gone = False
        self.memory = None      # at its first settlement
        self.descriptors = 1000     # the limit

    def __str__(self):
        return '%s (%d)' % (self.name, self.pid)


class Soak:

    def __init__(self, seed, say=print):
        self.seed = seed
        self.say = say
        self.start = time.monotonic()
        self.directory = tempfile.mkdtemp(prefix='un-', dir='/tmp')
        self.path = os.path.join(self.directory, 'run', 's')
        os.mkdir(os.path.dirname(self.path))
        numbers = os.path.join(self.directory, 'numbers')
        with open(numbers, 'w+b') as file:
            file.truncate(shared.SIZE)
            self.numbers = shared.counters(file)
        self.numbers[shared.RUN] = 1
        self.lock = threading.Lock()    # what readers and actions share:
        self.low = []
        self.ended = []         # connections, after and before when
        self.slots = 0          # how many are in use
        self.users = {}         # who they are, by slot
        self.cut = set()        # slots that owe nothing more
        self.processes = []     # those that emit without end
        self.readers = []
        self.names = collections.Counter()
        self.later = collections.defaultdict(list)
        self.done = collections.Counter()   # what was done, how often
        self.number = 0         # of the action
        self.rounds = 0         # of actions, each with its settlement
        self.rough = False
        self.led = None         # the pid of who was the last to lead
        self.sick = None        # since when, and why
        self.two_leaders = False    # there may be
        self.disturbed = []     # when connections could end: [from, to]
        self.healed = []        # seconds that it took
        self.slowest = 0
        self.connections = 0    # that have ended, and what they got
        self.received = 0
        self.lost = 0
        # Orphans are for us to reap.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.nursery = base.Publisher(
            self.directory, dict(OPTIONS, path=self.path),
            program=(SOAK_PUBLISHER,))
        self.nursery.ask('load')
        self.nursery.ask('attach', path=numbers, seed=seed)

    # Helpers.

    def tell(self, text, *args):
        self.say('%7.2f  %s' % (time.monotonic() - self.start, text % args))

    def began(self):
        return self.numbers[shared.BEGAN:(self.slots + 1) * shared.SLOT:
                            shared.SLOT].tolist()

    def new_slot(self, user):
        self.slots += 1
        self.users[self.slots] = user
        return self.slots

    def name(self, kind):
        self.names[kind] += 1
        return '%s%d' % (kind, self.names[kind])

    def wait(self, predicate, what, timeout):
        try:
            return base.wait_until(predicate, what, timeout)
        except AssertionError as error:
            raise Violation('%s; threads are of %s' % (error, {
                slot: self.users[slot]
                for slot in range(max(1, self.slots - 40), self.slots + 1)}))

    def leader(self):
        """Who leads, or was the last to: its lock may have been removed."""
        self.led = base.leader_pid(self.path) or self.led
        return next((each for each in self.processes
                     if each.pid == self.led), None)

    def awake(self):
        return [each for each in self.processes if not each.stopped]

    def running_slots(self):
        return [slot for each in self.processes for slot in each.slots]

    # Processes.

    def add_worker(self):
        child = base.fork(self.directory, self.nursery, 'fork')
        child.ask('open')
        return self._add('w', child, None)

    def _add(self, kind, child, parent):
        process = Process(self.name(kind), child, parent)
        choose = random.Random('%d/%s' % (self.seed, process.name))
        process.slots = [self.new_slot(process.name) for _ in range(
            choose.choice(THREADS) if self.running_slots()
            else max(THREADS))]
        child.ask('run', slots=process.slots, pause=PAUSE)
        self.processes.append(process)
        return process

    def stop(self, process, actions):
        process.stopped = True
        process.stops.append([time.monotonic(), None])
        base.stop(process.pid)
        self.later[self.number + actions].append(
            functools.partial(self.resume, process))

    def resume(self, process):
        if process.stopped and not process.gone:
            self.tell('  goes on: %s', process)
            process.child.kill(signal.SIGCONT)
            process.stops[-1][1] = time.monotonic()
        process.stopped = False

    def end(self, process, how, slots=(), amid=None, **last):
        """End a process in some way, and note what that means.

        :param amid: another, that is killed so many seconds later
        :param last: what it emits right before it leaves by itself
        """
        leads = self.leader() is process
        slots = [*process.slots, *slots]
        abrupt = how in ('_exit', 'SIGTERM', 'SIGKILL')
        if not abrupt:
            process.child.ask('halt')
            self._check_calls(process)
        begin, hand_ons = time.monotonic(), self._hand_ons()
        self._send_off(process, how, last)
        if amid is not None:
            time.sleep(amid[1])
            self.end(amid[0], 'SIGKILL')
        self._reap(process)
        took = time.monotonic() - begin
        if leads:
            handed_on = self._hand_ons() > hand_ons
            self.done['leaders that handed on'] += handed_on
            self.fault('%s of the leader' % how, begin, ends=(
                amid is not None or not handed_on))
        if abrupt or amid is not None or (
                self._exit_time(process, took) >= base.EXIT_STALL):
            self.cut.update(slots)
            self.done['processes whose last words were not owed'] += 1
        else:
            self.done['processes whose last words were owed'] += 1

    def _hand_ons(self):
        """How often that was logged, by either side."""
        return len(self.nursery.log('handed on to'))

    def _send_off(self, process, how, last):
        child = process.child
        if how == 'handled':
            child.ask('handle_sigterm')
            child.kill(signal.SIGTERM)
            # Python may have looked for signals, and not be reading yet: then
            # only a command lets it look again.
            with contextlib.suppress(OSError):
                child.tell('emitted')
        elif how.startswith('SIG'):
            child.kill(getattr(signal, how))
        else:
            child.tell('leave', how=how, **last)

    def _reap(self, process):
        parent = process.parent
        if parent is not None and parent.gone:
            self.wait(lambda: os.waitpid(process.pid, os.WNOHANG)[0],
                      '%s is gone' % process, base.PATIENCE)
        else:
            if parent is not None:
                self.resume(parent)
            (parent.child if parent else self.nursery).ask(
                'reap', pid=process.pid)
        process.gone = True
        process.child.close()
        if process in self.processes:
            self.processes.remove(process)

    def _exit_time(self, process, took):
        """How long the exit handlers took, if it ran any that tell."""
        lines = self.nursery.log('exit handlers of %d took' % process.pid)
        return min([took, *(float(line.split()[-2]) for line in lines)])

    # Faults, and what becomes of them.

    def fault(self, what, since=None, ends=False):
        """From now on, or then, somebody may not be served.

        :param ends: whether connections may end
        """
        since = since or time.monotonic()
        if self.sick is None:
            self.sick = since, what
        if ends:
            self.disturbed.append([since, None])

    def owe_from_now(self):
        with self.lock:
            began = self.began()
            for reader in self.readers:
                if reader.ledger is not None:
                    reader.ledger.owe_from(began)

    def heal(self):
        """After a fault a new subscriber hears all, before long."""
        if self.sick is None or len(self.awake()) < len(self.processes):
            return      # who is stopped may be who has to see to it
        begin, (since, what) = time.monotonic(), self.sick
        probe = Reader(self, 'probe')
        try:
            self.wait(lambda: self._hears_all(probe), lambda: (
                'healed after %s, %.3f s ago; %s' % (
                    what, time.monotonic() - since, self._unheard(probe))),
                HEAL)
        finally:
            probe.close()
        self.healed.append(time.monotonic() - begin)
        self.sick = None
        if self.two_leaders:
            self.two_leaders = False    # for who connects from now on
            self.owe_from_now()
        for window in self.disturbed:
            window[1] = window[1] or time.monotonic()

    def _hears_all(self, probe):
        ledger = probe.ledger
        return ledger is not None and all(
            slot in ledger.heard for slot in self.running_slots())

    def _unheard(self, probe):
        ledger = probe.ledger
        if ledger is None:
            return 'nobody accepts'
        return 'not heard: threads %s of %s; leader: %s' % (
            [slot for slot in self.running_slots()
             if slot not in ledger.heard],
            ['%s: %s' % (each, each.slots) for each in self.processes],
            self.leader())

    # What can be done.

    def do_join(self, choose, by_program=False):
        if len(self.readers) < READERS + CROWD:
            reader = Reader(self, self.name('r'), by_program)
            self.readers.append(reader)
            return reader

    def do_join_by_program(self, choose):
        return self.do_join(choose, by_program=True)

    def _guest(self, choose):
        guests = self.readers[READERS:]
        return choose.choice(guests) if guests else None

    def do_part(self, choose):
        guest = self._guest(choose)
        if guest is not None:
            self.readers.remove(guest)
            guest.close()
        return guest

    def do_stall(self, choose):
        reader = choose.choice(self.readers)
        reader.reading.clear()
        reader.stalled = reader.stalled or time.monotonic()
        self.later[self.number + choose.randint(2, 8)].append(
            reader.reading.set)
        return reader

    def do_half_close(self, choose):
        reader = choose.choice(self.readers)
        if reader.ledger is not None and not reader.by_program:
            reader.half_close()
            return reader

    def do_kill_program(self, choose):
        programs = [each for each in self.readers if each.by_program]
        if programs:
            reader = choose.choice(programs)
            reader.kill()
            return reader

    def do_knock(self, choose):
        """Connect and go, at once."""
        for _ in range(20):
            with (socket.socket(socket.AF_UNIX) as sock,
                  contextlib.suppress(OSError)):
                sock.setblocking(False)
                sock.connect(self.path)
        return 'twenty times'

    def do_flood(self, choose):
        """Somebody connects and goes, again and again, for a second."""
        leader = self.leader()
        if leader is None or leader.stopped:
            return None
        before = self._visits_logged()
        done = subprocess.run(
            [sys.executable, '-S', '-E', '-c', FLOOD, self.path],
            stdout=subprocess.PIPE, text=True, check=True)
        lines = self._visits_logged() - before
        if lines > LOG_LINES:
            raise Violation('%d lines are logged in a flood' % lines)
        return '%s times, %d lines logged' % (done.stdout.strip(), lines)

    def _visits_logged(self):
        return sum(': subscriber' in line and 'lag' not in line
                   and 'caught' not in line for line in self.nursery.log())

    def do_talk(self, choose):
        guest = self._guest(choose)
        if guest is not None and not guest.by_program:
            guest.talk()
            return guest

    def do_rush(self, choose):
        self.numbers[shared.RUSH] += 1
        return 'all emit many'

    def _kill(self, process, choose):
        self.fault('a kill')
        if choose.random() < 0.5:   # amid much that is on its way
            self.do_rush(choose)
            time.sleep(choose.uniform(0, 0.05))
        self.end(process, 'SIGKILL')
        self._make_up()
        return process

    def _make_up(self):
        # Where nobody emits nobody looks after the path.
        while len(self.processes) < WORKERS or not self.running_slots():
            self.add_worker()

    def _leave(self, process, choose):
        self.resume(process)
        how = choose.choice(('exit', 'return', 'handled'))
        self.fault('a leave')
        self.end(process, how)
        self._make_up()
        return '%s: %s' % (process, how)

    def _victim(self, choose, leads):
        """Who is to go. The oldest is spared, to see how its memory grows.

        But for every third time that it leads, for it may do so for long.
        """
        victim = self.leader() if leads else self._follower(choose)
        spared = victim is self.processes[0] and (
            not leads or choose.random() < 0.67)
        return None if spared else victim

    def _follower(self, choose):
        return choose.choice([each for each in self.processes
                              if each is not self.leader()])

    def do_kill_leader(self, choose, leads=True):
        victim = self._victim(choose, leads)
        return victim and self._kill(victim, choose)

    def do_kill_follower(self, choose):
        return self.do_kill_leader(choose, leads=False)

    def do_kill_leader_awaited(self, choose):
        """Somebody connects, and others emit, amid the end of the leader.

        It is stopped first. So who connects is not accepted, and what is
        emitted then reaches it, and nobody else.
        """
        victim = self._victim(choose, leads=True)
        slots = [slot for each in self.awake() if each is not victim
                 for slot in each.slots]
        if victim is None or not slots or not os.path.exists(self.path):
            return None
        base.stop(victim.pid)
        reader = choose.choice(self.readers)
        waits = reader.renew()
        before = self.began()
        self.wait(lambda: all(now[slot] > before[slot] + 2 for now in [
            self.began()] for slot in slots), 'all others emit', HEAL)
        return '%s; %s waits: %s' % (self._kill(victim, choose), reader, waits)

    def do_kill_leader_flat_out(self, choose):
        """Its followers have much on its way, and much that is lost."""
        victim = self._victim(choose, leads=True)
        if victim is not None:
            self.numbers[shared.FLAT_OUT] = 1
            time.sleep(choose.uniform(0, 0.5))
            self._kill(victim, choose)
            self.numbers[shared.FLAT_OUT] = 0
        return victim

    def do_leave_leader(self, choose, leads=True):
        victim = self._victim(choose, leads)
        return victim and self._leave(victim, choose)

    def do_leave_leader_without_heir(self, choose):
        """The one that may have become it is killed as it does."""
        victim = self._victim(choose, leads=True)
        # Not its children, whom only it could reap.
        others = [each for each in self.awake()
                  if each not in (victim, self.processes[0])
                  and each.parent is not victim]
        if victim is None or not others:
            return None
        self.resume(victim)
        heir = choose.choice(others)
        self.fault('a leave')
        self.end(victim, 'exit', amid=(heir, choose.uniform(0, 0.005)))
        self._make_up()
        return '%s; killed: %s' % (victim, heir)

    def do_leave_follower(self, choose):
        return self.do_leave_leader(choose, leads=False)

    def do_stop_leader(self, choose):
        leader = self.leader()
        if leader is not None and not leader.stopped:
            self.fault('a stop')
            self.stop(leader, choose.randint(1, 6))
            return leader

    def do_stop_follower(self, choose):
        process = self._follower(choose)
        if not process.stopped:
            self.fault('a stop')
            self.stop(process, choose.randint(1, 6))
            return process

    def do_fork(self, choose):
        """A child emits, and leaves."""
        if not self.awake():
            return None
        parent = choose.choice(self.awake())
        how = choose.choice(('fork', 'fork', 'multiprocessing', 'thread'))
        end = choose.choice(
            ('exit', 'return', 'handled', '_exit', 'SIGTERM', 'SIGKILL'))
        child = Process(self.name('c'), base.fork(
            self.directory, parent.child, how), parent)
        slot = self.new_slot(child.name)
        last = {'slot': slot, 'count': choose.randint(1, 300)}
        if end != '_exit':      # else nobody could ask for its calls
            child.child.ask('burst', **last)
            last = {}
        self.end(child, end, [slot], **last)
        return '%s of %s by %s, ends by %s' % (child, parent, how, end)

    def do_fork_to_stay(self, choose):
        if self.awake() and len(self.processes) < WORKERS + CROWD:
            parent = choose.choice(self.awake())
            self.fault('a start')
            return '%s of %s' % (self._add('c', base.fork(
                self.directory, parent.child, 'fork'), parent), parent)

    def _remove(self, *suffixes):
        if self.sick is not None and not self.rough:
            return None     # nobody could see to what was removed before
        if self.sick is not None or len(suffixes) > 1:
            self.two_leaders = True
            self.fault('a removal', ends=True)
        self.fault('a removal')
        self.leader()           # is known by the lock
        for suffix in suffixes:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path + suffix)
        return 'ok'

    def do_remove_socket(self, choose):
        return self._remove('')

    def do_remove_relay(self, choose):
        return self._remove('.relay')

    def do_remove_lock(self, choose):
        return self._remove('.lock')

    def do_remove_all(self, choose):
        names = ['', '.relay', '.lock']
        choose.shuffle(names)
        return self._remove(*names)

    def do_remove_directory(self, choose):
        self.two_leaders = True
        self.fault('the removal of the directory', ends=True)
        self.leader()           # is known by the lock
        directory = os.path.dirname(self.path)
        os.rename(directory, directory + '.old')    # at once
        shutil.rmtree(directory + '.old')
        time.sleep(choose.choice((0, 0.02, 0.5, 1.5)))
        os.mkdir(directory)
        return 'and made again'

    # The course of it.

    def act(self):
        """Do what comes next; the seed and its number say what."""
        self.number += 1
        choose = random.Random('%d/%d' % (self.seed, self.number))
        for function in self.later.pop(self.number, []):
            function()
        kinds = [kind for kind in ACTIONS
                 if self.rough or kind not in ROUGH]
        kind, = choose.choices(kinds, [ACTIONS[each] for each in kinds])
        result = getattr(self, 'do_' + kind)(choose)
        if result is not None:
            self.done[kind] += 1
            self.tell('#%d %s: %s', self.number, kind, result)
        self.heal()
        self.check()
        time.sleep(choose.uniform(0, 0.3))

    def check(self):
        """What has to hold at any time."""
        for reader in self.readers:
            if reader.ledger is not None:
                self._check_problems(reader.ledger)
        with self.lock:
            ended, self.ended = self.ended, []
        for since, until, ledger in ended:
            self._check_problems(ledger)
            if not ledger.may_end and not any(
                    begin <= until and (end is None or since <= end + READ)
                    for begin, end in self.disturbed):
                raise Violation('%s has ended, %.2f s ago' % (
                    ledger.who, time.monotonic() - until))
            ledger.check(self.began(), set(), ended=True)
            self.received += ledger.received
            self.lost += ledger.lost
            self.connections += 1
        for process in self.processes:
            if base.status(process.pid)['State'].startswith('Z'):
                raise Violation('%s has ended' % process)

    def _check_problems(self, ledger):
        if ledger.problems or ledger.refused is not None:
            raise Violation('%s: %s; refused: %s' % (
                ledger.who, ledger.problems[:3], ledger.refused))

    def settle(self):
        """Have everything go on, and then come to rest; and balance."""
        for number in sorted(self.later):
            for function in self.later.pop(number):
                function()
        self.heal()
        self.wait(lambda: all(each.ledger for each in self.readers),
                  'all readers are connected', HEAL)
        self.wait(self._is_whole, lambda: 'all is there again: %s' % (
            os.listdir(os.path.dirname(self.path))), HEAL)
        self.numbers[shared.RUN] = 0
        end = self._mark()
        self._wait_settled(end)
        self._last_words()
        end = self._wait_last()
        self.check()
        for reader in self.readers:
            reader.ledger.check(end, self.cut)
        self._check_processes()
        self._begin_anew(end)

    def _is_whole(self):
        return base.leader_pid(self.path) in [
            each.pid for each in self.processes] and all(
                os.path.exists(self.path + suffix)
                for suffix in ('', '.relay'))

    def _mark(self):
        """Have all threads emit a last one; what each has begun by then."""
        self.numbers[shared.MARK] += 1
        mark = self.numbers[shared.MARK]
        self.wait(lambda: all(
            self.numbers[slot * shared.SLOT + shared.ACK] == mark
            for slot in self.running_slots()), 'all threads pause',
            base.PATIENCE)
        return self.began()

    def _wait_settled(self, end):
        for reader in self.readers:
            self.wait(lambda: self._is_settled(reader.ledger, end),
                      lambda: '%s has what it is owed: %r; reported lost: %d'
                      % (reader, reader.ledger.owed(end, self.cut),
                         reader.ledger.reported()), base.PATIENCE)

    def _is_settled(self, ledger, end):
        if ledger is None:
            return False
        self._check_problems(ledger)    # or it may never be
        return ledger.settled(end, self.cut)

    def _last_words(self):
        """While all rests: who leaves by os._exit has handed on all it said.

        Its thread is not cut, so the books tell.
        """
        child = base.fork(self.directory, self.nursery, 'fork')
        child.ask('open')
        process = Process(self.name('l'), child, None)
        slot = self.new_slot(process.name)
        child.ask('burst', slot=slot, count=1)      # it follows
        self._wait_settled(self.began())
        time.sleep(0.1)     # until its loop rests, too
        child.tell('leave', how='_exit', slot=slot, short=True,
                   count=LAST_WORDS[self.rounds % len(LAST_WORDS)])
        self._reap(process)
        self._wait_settled(self.began())

    def _wait_last(self):
        """Have each reader get the last of each thread.

        Nothing can come any more after these. Books may balance earlier, if
        more was lost at connect() than was owed; hence what is emitted then
        may be lost as well, and reported, while the rest comes.
        """
        deadline = time.monotonic() + base.PATIENCE
        while True:
            end = self._mark()
            try:
                base.wait_until(lambda: not self._lacks(end), '', 0.5)
                return end
            except AssertionError:
                if time.monotonic() > deadline:
                    raise Violation('the last of each thread does not come: '
                                    '%r' % self._lacks(end))

    def _lacks(self, end):
        """Of each reader, what it has got and should have got, by thread."""
        return {reader.name: lacks for reader in self.readers if (lacks := {
            slot: (reader.last_of(slot), end[slot])
            for slot in self.running_slots()
            if reader.last_of(slot) != end[slot]})}

    def _begin_anew(self, end):
        ledgers = [reader.ledger for reader in self.readers]
        with self.lock:
            self.low = end
            for reader in self.readers:
                reader.ledger.begin(end, end)
                reader.stalled = None
        self.disturbed.clear()
        self.tell(
            'settled: %d processes, %d emitted; %d connections, %d received, '
            '%d lost; healed in at most %.2f s; longest call %.0f ms',
            len(self.processes), sum(end[1:]), self.connections,
            self.received + sum(ledger.received for ledger in ledgers),
            self.lost + sum(ledger.lost for ledger in ledgers),
            max(self.healed, default=0), self.slowest * 1000)
        self.numbers[shared.RUN] = 1

    # What the processes may take.

    def _check_processes(self):
        problems = self.nursery.log('Traceback')
        if problems:
            raise Violation('in the log: %s' % problems)
        for process in self.processes:
            self._check_calls(process)
            self._check_memory(process)
            self._check_descriptors(process)

    def _check_calls(self, process):
        for begin, end, waited, blocked in process.child.ask('watched'):
            self.slowest = max(self.slowest, end - begin)
            self.done['calls of more than 50 ms'] += 1
            blocked -= sum(max(0, min(end, stop[1]) - max(begin, stop[0]))
                           for stop in process.stops)
            if blocked > shared.SLOW:
                raise Violation(
                    '%s was blocked for %.3f s of %.3f s (it waited for '
                    '%.3f s) in notify(), at %.2f' % (
                        process, blocked, end - begin, waited,
                        begin - self.start))

    def _check_memory(self, process):
        now = base.memory(process.pid)
        if process.memory is None:
            process.memory = now
        if now > process.memory + GROWTH:
            raise Violation('%s grew from %d to %d bytes' % (
                process, process.memory, now))

    def _check_descriptors(self, process):
        """As many as ever, but for its followers and subscribers."""
        def own():
            return base.descriptors(process.pid) - (
                len(self.readers) + len(self.processes) - 1
                if self.leader() is process else 0)

        limit = process.descriptors = min(
            process.descriptors, own() + ROLE)
        self.wait(lambda: own() <= limit, lambda: (
            '%s has at most %d descriptors: %s' % (
                process, limit, base.open_files(process.pid))), HEAL)

    # All of it.

    def run(self, seconds):
        for _ in range(WORKERS):
            self.add_worker()
        self.fault('the start', ends=True)
        for _ in range(READERS):
            self.do_join(None)
        self.settle()
        # One of each kind at least.
        while time.monotonic() < self.start + seconds or self.rounds < 2:
            for _ in range(ACTIONS_TO_SETTLEMENT):
                self.act()
            self.settle()
            self.rounds += 1
            self.rough = not self.rough

    def close(self):
        for reader in self.readers:
            reader.close()
        for process in self.processes:
            process.child.close()
        self.nursery.close()
        shutil.rmtree(self.directory)

    def account(self, error):
        """What went wrong, when, and how to see it again."""
        # Of the same time zone as the log.
        self.tell(time.strftime('It is %H:%M:%S'))
        self.tell('VIOLATED at action %d, seed %d: %s', self.number,
                  self.seed, error)
        self.say('The last of the log:')
        for line in self.nursery.log()[-60:]:
            self.say('    ' + line[:300])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.partition('\n')[0])
    parser.add_argument('--seconds', type=float, default=600)
    parser.add_argument('--seed', type=int,
                        default=random.randrange(1000000))
    arguments = parser.parse_args()
    print('seed %d' % arguments.seed)
    soak = Soak(arguments.seed, functools.partial(print, flush=True))
    try:
        soak.run(arguments.seconds)
    except (Violation, AssertionError) as error:
        soak.account(error)
        return 1
    finally:
        soak.close()
        print('seed %d, %d actions: %s' % (
            soak.seed, soak.number, dict(sorted(soak.done.items()))))
    return 0


if __name__ == '__main__':
    sys.exit(main())
