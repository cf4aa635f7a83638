"""Clients that know what they must get, for tests/programs.sh.

    client.py KIND [--port N] [--connections N] [options] --to ADDRESS

Each connection asks without a pause until SIGTERM. Says `ready` when all have had an answer, and at the
end one line of JSON: answers, how many were wrong, errors (of which one ends its connection), and in
milliseconds the longest time between a question and its answer, and in which none had any.
"""

import argparse
import hashlib
import http.client
import json
import random
import signal
import socket
import sys
import threading
import time

# No answer for so long is an error: TCP alone would wait for a quarter of an hour.
PATIENCE = 60

over = threading.Event()


class Silence:
    """The longest time without an answer on any connection."""

    def __init__(self):
        self.lock = threading.Lock()
        self.last = None
        self.longest = 0.0

    def ends(self):
        with self.lock:
            now = time.monotonic()
            if self.last is not None:
                self.longest = max(self.longest, now - self.last)
            self.last = now


silence = Silence()


class Lines:
    """One line asked, one line answered."""

    def __init__(self, options):
        self.socket = socket.create_connection((options.to, options.port), timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb")

    def say(self, line):
        self.socket.sendall(line.encode() + b"\r\n")

    def hear(self):
        line = self.file.readline()
        if not line.endswith(b"\n"):
            raise EOFError(f"the connection ended after {line!r}")
        return line.rstrip(b"\r\n").decode()

    def line(self, line):
        self.say(line)
        return self.hear()


class Sum(Lines):
    """The server keeps for each connection a sum of what it was told, and says it."""

    port = 7000
    sum = 0

    def ask(self, number):
        self.sum += number
        return self.line(str(number)) == str(self.sum)


class Rows(Lines):
    """Each number is a row that the server says is written; at the end all are asked for."""

    port = 7000
    lock = threading.Lock()
    written = set()
    next = 0

    def ask(self, _):
        with Rows.lock:
            Rows.next += 1
            number = Rows.next
        if self.line(f"insert {number}") != "ok":
            return False
        with Rows.lock:
            Rows.written.add(number)
        return True

    @staticmethod
    def end(options):
        answer = json.loads(Rows(options).line("all"))
        missing = sorted(Rows.written - set(answer["rows"]))
        return {"rows": len(Rows.written), "missing": missing, "twice": answer["twice"],
                "integrity": answer["integrity"]}


class Memcached(Lines):
    """Keys of each connection's own: the last value, and a counter."""

    port = 11211
    lock = threading.Lock()
    names = 0

    def __init__(self, options):
        super().__init__(options)
        with Memcached.lock:
            Memcached.names += 1
            self.name = Memcached.names
        self.values = {}
        self.count = 0
        self.set("count", "0")

    def set(self, key, value):
        self.say(f"set {self.name}.{key} 0 0 {len(value)}")
        return self.line(value) == "STORED"

    def ask(self, number):
        key = f"k{number % 5000}"
        if key in self.values:
            want = self.values[key]
            header = self.line(f"get {self.name}.{key}")
            if header != f"VALUE {self.name}.{key} 0 {len(want)}":
                return False
            if self.hear() != want or self.hear() != "END":
                return False
        self.values[key] = f"{number}:" + "x" * (number % 900)
        self.count += 1
        return self.set(key, self.values[key]) and self.line(f"incr {self.name}.count 1") == str(self.count)


class Http:
    """The same page again and again by one connection, with a known digest."""

    port = 80

    def __init__(self, options):
        self.options = options
        self.connection = http.client.HTTPConnection(options.to, options.port, timeout=PATIENCE)
        self.connection.connect()
        # A server that closes is an error, not a reason to connect again.
        self.connection.auto_open = 0

    def ask(self, number):
        self.connection.request("GET", self.options.path.replace("NUMBER", str(number)))
        answer = self.connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise ValueError(f"status {answer.status}: {body[:200]!r}")
        if self.options.sha256:
            return hashlib.sha256(body).hexdigest() == self.options.sha256
        # A page that is made for each: what was asked, and its square.
        return body.decode().split() == [str(number), str(number * number)]


class Mariadb:
    """Moves money between accounts, and writes each time of that into a ledger."""

    port = 3306
    ACCOUNTS = 1000
    lock = threading.Lock()
    committed = 0

    def __init__(self, options):
        import pymysql

        self.connection = pymysql.connect(
            host=options.to, port=options.port, user="bank", password="bank", database="bank",
            read_timeout=PATIENCE, write_timeout=PATIENCE)
        self.retry = pymysql.err.OperationalError

    def ask(self, number):
        amount = number % 97
        from_, to = random.sample(range(self.ACCOUNTS), 2)
        # Deadlocks are the clients' own affair.
        while True:
            try:
                with self.connection.cursor() as cursor:
                    cursor.execute("begin")
                    cursor.execute("update account set balance = balance - %s where id = %s", (amount, from_))
                    cursor.execute("update account set balance = balance + %s where id = %s", (amount, to))
                    cursor.execute("insert into ledger (a, b, amount) values (%s, %s, %s)", (from_, to, amount))
                    cursor.execute("commit")
            except self.retry as error:
                if error.args[0] not in (1205, 1213):
                    raise
                continue
            with Mariadb.lock:
                Mariadb.committed += 1
            return True

    @staticmethod
    def end(options):
        def one(statement):
            with connection.cursor() as cursor:
                cursor.execute(statement)
                return int(cursor.fetchone()[0])

        connection = Mariadb(options).connection
        return {"committed": Mariadb.committed, "ledger": one("select count(*) from ledger"),
                "sum": one("select sum(balance) from account"),
                "balances": one("select count(*) from account x where balance !="
                                " coalesce((select sum(amount) from ledger where b = x.id), 0)"
                                " - coalesce((select sum(amount) from ledger where a = x.id), 0)")}


KINDS = {"sum": Sum, "rows": Rows, "memcached": Memcached, "http": Http, "mariadb": Mariadb}


class Worker(threading.Thread):
    """One connection."""

    def __init__(self, kind, options):
        super().__init__(daemon=True)
        self.kind, self.options = kind, options
        self.answers = self.wrong = 0
        self.worst = 0.0
        self.error = None

    def run(self):
        try:
            connection = self.kind(self.options)
            while not over.is_set():
                began = time.monotonic()
                if not connection.ask(random.randrange(1, 1_000_000)):
                    self.wrong += 1
                self.worst = max(self.worst, time.monotonic() - began)
                silence.ends()
                self.answers += 1
        except Exception as error:  # pylint: disable=broad-except
            self.error = f"{type(error).__name__}: {error}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--to", required=True)
    parser.add_argument("--port", type=int)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--path", default="/")
    parser.add_argument("--sha256")
    options = parser.parse_args()
    kind = KINDS[options.kind]
    options.port = options.port or kind.port
    signal.signal(signal.SIGTERM, lambda *_: over.set())

    workers = [Worker(kind, options) for _ in range(options.connections)]
    for worker in workers:
        worker.start()
    while any(worker.answers == 0 and worker.error is None for worker in workers):
        over.wait(0.01)
    print("ready", flush=True)
    while not over.wait(1):
        # One that has failed is told at once: the script looks whether this runs.
        if any(worker.error for worker in workers):
            break
    over.set()
    for worker in workers:
        worker.join(PATIENCE)
    found = {
        "answers": sum(worker.answers for worker in workers),
        "wrong": sum(worker.wrong for worker in workers),
        "errors": [worker.error for worker in workers if worker.error]
        + ["no answer" for worker in workers if worker.is_alive()],
        "worst_ms": max(worker.worst for worker in workers) * 1000,
        "silent_ms": silence.longest * 1000,
    }
    try:
        found |= kind.end(options) if hasattr(kind, "end") else {}
    except Exception as error:  # pylint: disable=broad-except
        found["errors"].append(f"at the end: {type(error).__name__}: {error}")
    print(json.dumps(found), flush=True)
    sys.exit(bool(found["errors"]))


main()
