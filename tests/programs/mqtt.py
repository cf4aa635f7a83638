"""mqtt.py ADDRESS: mosquitto_pub and mosquitto_sub with QoS 2 until SIGTERM; says what client.py says."""

import json
import signal
import subprocess
import sys
import threading
import time

address = sys.argv[1]
over = threading.Event()
common = ["-h", address, "-q", "2", "-t", "numbers", "-k", "60"]
sub = subprocess.Popen(["stdbuf", "-oL", "mosquitto_sub", *common, "-i", "subscriber", "-d"],
                       stdout=subprocess.PIPE, text=True)
# What it says of itself (-d) stands beside the messages.
for line in sub.stdout:
    if "SUBACK" in line:
        break
signal.signal(signal.SIGTERM, lambda *_: over.set())
pub = subprocess.Popen(["mosquitto_pub", *common, "-i", "publisher", "-l"], stdin=subprocess.PIPE, text=True)
heard, at, notes = [], {}, []


def listen():
    for line in sub.stdout:
        if line.strip().isdigit():
            heard.append(int(line))
            at.setdefault(int(line), time.monotonic())
        elif " sending CONNECT" in line:
            notes.append(line.strip())


listener = threading.Thread(target=listen, daemon=True)
listener.start()
sent, sent_at, ready, errors = 0, {}, False, []
while not over.wait(0.005):
    if pub.poll() is not None or sub.poll() is not None:
        errors.append("a client has ended")
        break
    sent += 1
    sent_at[sent] = time.monotonic()
    pub.stdin.write(f"{sent}\n")
    pub.stdin.flush()
    if not ready and heard:
        print("ready", flush=True)
        ready = True
if not errors:
    pub.stdin.close()
    if pub.wait(60) != 0:
        errors.append(f"the publisher ended with {pub.returncode}")
end = time.monotonic() + 60
while len(at) < sent and time.monotonic() < end and not errors:
    time.sleep(0.01)
sub.terminate()
listener.join(10)
# A connection made again is one that was lost.
errors += notes
found = {
    "answers": len(heard), "wrong": 0, "errors": errors, "sent": sent,
    "worst_ms": 1000 * max((at[n] - sent_at[n] for n in at if n in sent_at), default=0),
    "missing": len(set(range(1, sent + 1)) - set(heard)), "twice": len(heard) - len(set(heard)),
    "disordered": sum(b < a for a, b in zip(heard, heard[1:])),
}
print(json.dumps(found), flush=True)
sys.exit(bool(errors))
