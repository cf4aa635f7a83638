"""ssh_session.py ADDRESS: types at a shell until SIGTERM; says what client.py says."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import threading
import time

over = threading.Event()
child, terminal = pty.fork()
if child == 0:
    os.execvp("ssh", ["ssh", "-tt", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
                      "-o", "ServerAliveInterval=0", f"root@{sys.argv[1]}", "exec bash --norc --noediting -i"])
fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 111, 0, 0))
seen = ""


def expect(pattern, seconds=60):
    """What the terminal shows, up to the pattern."""
    global seen
    end = time.monotonic() + seconds
    while not (match := re.search(pattern, seen)):
        if not select.select([terminal], [], [], max(0, end - time.monotonic()))[0]:
            raise TimeoutError(f"no {pattern!r} after {seen[-300:]!r}")
        seen += os.read(terminal, 65536).decode(errors="replace")
    seen = seen[match.end():]
    return match


def types(text):
    os.write(terminal, text.encode())


def state():
    """What must be the same afterwards. The command as it is echoed has another form than its answer."""
    types("jobs -l; stty size; tty; echo \"[$(ps -o stat= -p $$)]\" ; (: </dev/tty) && echo has-a-tty; echo d''one\n")
    expect("echo d''one\r\n")
    return expect(r"(?s)(.*)done\r\n").group(1)


found = {"answers": 0, "wrong": 0, "errors": [], "worst_ms": 0.0}
try:
    expect(r"# ")
    types("PS1=; X=0; set +o history; sleep 100000 & sh -c 'echo run''ning; exec sleep 20000'\n")
    expect("\r\nrunning\r\n")
    types("\x1a")
    expect("Stopped")
    types("echo r''eady\n")
    expect("\r\nready\r\n")
    before = state()
    if not all(word in before for word in ("33 111", "Stopped", "Running", "/dev/pts/")):
        raise ValueError(f"not as it is to be: {before!r}")
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    print("ready", flush=True)
    while not over.is_set():
        began = time.monotonic()
        types("X=$((X+1)); echo \"<$X>\"\n")
        if int(expect(r"<(\d+)>\r\n").group(1)) != found["answers"] + 1:
            found["wrong"] += 1
        found["answers"] += 1
        found["worst_ms"] = max(found["worst_ms"], 1000 * (time.monotonic() - began))
    after = state()
    if after != before:
        found["errors"].append(f"it was {before!r} and is {after!r}")
    types("fg %2\n")
    expect("sleep 20000'\r\n")
    types("\x03")
    types("echo a''fter $?\n")
    if expect(r"after (\d+)").group(1) != "130":
        found["errors"].append("Ctrl-C has not ended the job")
    types("kill %1; exit 7\n")
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 7:
        found["errors"].append("the session did not end with 7")
except Exception as error:  # pylint: disable=broad-except
    found["errors"].append(f"{type(error).__name__}: {error}")
print(json.dumps(found), flush=True)
sys.exit(bool(found["errors"]))
