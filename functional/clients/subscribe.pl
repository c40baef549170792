# SPDX-License-Identifier: Apache-2.0
# Print the stream of a Unix socket, by Perl.
use strict;
use warnings;
use IO::Socket::UNIX;

$| = 1;
my $sock = IO::Socket::UNIX->new($ARGV[0]) or die "$ARGV[0]: $!\n";
print while <$sock>;
