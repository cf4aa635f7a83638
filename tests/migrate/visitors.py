# Visitors of a web server who stay: each keeps its connection, and asks again on it when told to.
#   visitors.py ADDRESS COUNT        lines on standard input: ask, quit
import json
import socket
import sys

address, count = sys.argv[1], int(sys.argv[2])
request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def answer(s):
    said = b""
    while b"\r\n\r\n" not in said:
        some = s.recv(65536)
        if not some:
            raise OSError("closed")
        said += some
    head, body = said.split(b"\r\n\r\n", 1)
    length = next(int(l.split(b":")[1]) for l in head.split(b"\r\n") if l.lower().startswith(b"content-length"))
    while len(body) < length:
        some = s.recv(65536)
        if not some:
            raise OSError("closed")
        body += some
    return head.split(b"\r\n")[0], body


def ask():
    wrong = 0
    for s in visitors:
        s.sendall(request)
    for s in visitors:
        try:
            wrong += answer(s) != usual
        except (OSError, StopIteration):
            wrong += 1
    return wrong


visitors = [socket.create_connection((address, 80), timeout=20) for _ in range(count)]
visitors[0].sendall(request)
usual = answer(visitors[0])
print(json.dumps({"ready": ask() == 0}), flush=True)
for line in sys.stdin:
    if line.strip() != "ask":
        break
    print(json.dumps({"wrong": ask()}), flush=True)
