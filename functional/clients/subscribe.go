// SPDX-License-Identifier: Apache-2.0
// Print the stream of a Unix socket, by Go.
package main

import (
	"bufio"
	"fmt"
	"log"
	"net"
	"os"
)

func main() {
	conn, err := net.Dial("unix", os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	lines := bufio.NewScanner(conn)
	// At a longer line Scan() ends, from 64 KiB on unless told otherwise.
	lines.Buffer(nil, 1<<26+1)
	for lines.Scan() {
		fmt.Println(lines.Text())
	}
	if lines.Err() != nil {
		log.Fatal(lines.Err())
	}
}
