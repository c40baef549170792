// SPDX-License-Identifier: Apache-2.0
// Print the stream of a Unix socket, by Java, 16 or later.
import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.net.UnixDomainSocketAddress;
import java.nio.channels.Channels;
import java.nio.channels.SocketChannel;

class Subscribe {
    public static void main(String[] args) throws IOException {
        var channel = SocketChannel.open(UnixDomainSocketAddress.of(args[0]));
        var lines = new BufferedReader(
            new InputStreamReader(Channels.newInputStream(channel)));
        String line;
        while ((line = lines.readLine()) != null) {
            System.out.println(line);
        }
    }
}
