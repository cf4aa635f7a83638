"""A sum for each connection: a number is added, and the sum said."""

import socketserver


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        total = 0
        for line in self.rfile:
            total += int(line)
            self.wfile.write(b"%d\n" % total)


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True


Server(("", 7000), Handler).serve_forever()
