<?php
// SPDX-License-Identifier: Apache-2.0
// Print the stream of a Unix socket, by PHP.
// fgets() gives false after so many seconds of silence, 60 by default.
ini_set('default_socket_timeout', -1);
$sock = stream_socket_client("unix://$argv[1]") or exit(1);
while (($line = fgets($sock)) !== false) {
    echo $line;
}
