import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.net.ServerSocket;
import java.net.Socket;
import java.util.concurrent.ThreadLocalRandom;

/** A sum for each connection, and threads that keep the garbage collector busy. */
public class Server {
    public static void main(String[] args) throws Exception {
        for (int i = 0; i < 300; i++) {
            int seed = i;
            Thread.ofPlatform().daemon().start(() -> churn(seed));
        }
        ServerSocket listener = new ServerSocket(7000);
        while (true) {
            Socket socket = listener.accept();
            Thread.ofPlatform().start(() -> serve(socket));
        }
    }

    static void serve(Socket socket) {
        try (socket) {
            socket.setTcpNoDelay(true);
            var reader = new BufferedReader(new InputStreamReader(socket.getInputStream()));
            long sum = 0;
            for (String line; (line = reader.readLine()) != null;) {
                sum += Long.parseLong(line);
                socket.getOutputStream().write((sum + "\n").getBytes());
            }
        } catch (Exception error) {
            error.printStackTrace();
        }
    }

    /** Keeps a table of numbers, replaces one after the other, and looks whether the rest is as it was. */
    static void churn(int seed) {
        Long[][] table = new Long[50][];
        try {
            for (long round = 0;; round++) {
                int at = ThreadLocalRandom.current().nextInt(table.length);
                if (table[at] != null) {
                    for (Long number : table[at]) {
                        if (number % 1000 != seed) System.out.println("thread " + seed + " has found " + number);
                    }
                }
                table[at] = new Long[100];
                for (int i = 0; i < table[at].length; i++) table[at][i] = (round * 100 + i) * 1000 + seed;
                Thread.sleep(20);
            }
        } catch (Throwable error) {
            error.printStackTrace();
        }
    }
}
