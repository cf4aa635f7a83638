"""Rows into a database that several processes have open: `insert N`, `all`."""

import json
import os
import socketserver
import sqlite3

PATH = "/data.db"


def database():
    base = sqlite3.connect(PATH, timeout=60, isolation_level=None)
    base.execute("pragma synchronous = full")
    return base


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        base = database()
        for line in self.rfile:
            word, *rest = line.decode().split()
            if word == "insert":
                base.execute("insert into row values (?)", (int(rest[0]),))
                answer = "ok"
            else:
                rows = [number for (number,) in base.execute("select number from row")]
                integrity = base.execute("pragma integrity_check").fetchone()[0]
                answer = json.dumps({
                    "rows": rows, "twice": len(rows) - len(set(rows)), "integrity": integrity})
            self.wfile.write(answer.encode() + b"\n")


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    request_queue_size = 64


base = sqlite3.connect(PATH)
base.execute("pragma journal_mode = wal")
base.execute("create table row (number integer)")
base.close()
with Server(("", 7000), Handler) as server:
    for _ in range(3):
        if os.fork() == 0:
            break
    server.serve_forever()
