#!/usr/bin/env bash
# Expected: a program that starts no thread has one. A loop of uvloop changes
# that as little as one of asyncio, and threading knows of none.
#
# Versions: uvloop 0.22.1, with libuv 1.48.0; CPython 3.11.7 and 3.13.0; Linux
# 6.18, where io_uring is allowed.
#
# Behaviour: with the loop there comes a thread that the kernel runs, to poll a
# queue of io_uring, and that counts as the program's, as in ps -L. Python 3.12
# and later count so, too: they warn at each fork that the process is
# multi-threaded, which is an error where warnings are. And what the kernel
# grants to those of a single thread alone fails with EINVAL, such as a user
# namespace of one's own. UV_USE_IO_URING=0 in the environment avoids it.
#
# Seen, with Python 3.13, and with 3.11 but for the warning:
#   asyncio: threads 1, to the kernel 1; fork warns: no; unshare: done
#   uvloop: threads 1, to the kernel 2; fork warns: yes; unshare: EINVAL
#   uvloop without io_uring: threads 1, to the kernel 1; fork warns: no;
#     unshare: done
#
# Source: libuv, src/unix/linux.c, uv__platform_loop_init(), makes a ring with
# IORING_SETUP_SQPOLL for each loop; as of libuv 1.49 it must be asked for.
# CPython, Modules/posixmodule.c, warn_about_fork_with_threads(), reads the
# number of threads in /proc/self/stat. unshare(2): CLONE_NEWUSER.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check uvloop==0.22.1

cat >case.py <<'END'
import asyncio
import ctypes
import errno
import os
import sys
import threading
import warnings

import uvloop

CLONE_NEWUSER = 0x10000000

loop = {'asyncio': asyncio, 'uvloop': uvloop}[sys.argv[1]].new_event_loop()
loop.run_until_complete(asyncio.sleep(0))
print(threading.active_count())
print(len(os.listdir('/proc/self/task')), flush=True)
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter('always')
    if not os.fork():
        os._exit(0)
os.wait()
print('yes' if any('multi-threaded' in str(each.message) for each in warned)
      else 'no')
libc = ctypes.CDLL(None, use_errno=True)
print(errno.errorcode[ctypes.get_errno()] if libc.unshare(CLONE_NEWUSER)
      else 'done')
END
cat >look.py <<'END'
import os
import subprocess
import sys


def look(name, kind, **more):
    environment = {key: value for key, value in os.environ.items()
                   if key != 'UV_USE_IO_URING'}
    found = subprocess.run(
        [sys.executable, 'case.py', kind], stdout=subprocess.PIPE, text=True,
        timeout=20, check=True, env=environment | more).stdout.split()
    print('%s: threads %s, to the kernel %s; fork warns: %s; unshare: %s' % (
        name, *found), flush=True)
    return found


seen = (look('asyncio', 'asyncio'), look('uvloop', 'uvloop'),
        look('uvloop without io_uring', 'uvloop', UV_USE_IO_URING='0'))
# Who may not make a user namespace at all sees EPERM or the like here.
one = ['1', '1', 'no', seen[0][-1]]
warns = 'yes' if sys.version_info >= (3, 12) else 'no'
sys.exit(seen != (one, ['1', '2', warns, 'EINVAL'], one)
         or seen[0][-1] == 'EINVAL')
END
venv/bin/python look.py
