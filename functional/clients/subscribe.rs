// SPDX-License-Identifier: Apache-2.0
// Print the stream of a Unix socket, by Rust.
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;

fn main() -> std::io::Result<()> {
    let path = std::env::args_os().nth(1).expect("a path");
    for line in BufReader::new(UnixStream::connect(path)?).lines() {
        println!("{}", line?);
    }
    Ok(())
}
