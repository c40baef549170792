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

"""Print the stream of a Unix socket, by asyncio."""

import asyncio
import sys


async def main(path):
    # Of a longer line readline() raises ValueError, from 64 KiB on unless told
    # otherwise, and drops it.
    reader, _ = await asyncio.open_unix_connection(path, limit=2 ** 26 + 1)
    async for line in reader:
        print(line.decode('ascii'), end='', flush=True)


asyncio.run(main(sys.argv[1]))
