# What there is of everything on a host: printed as one JSON object of numbers. For tests/migrate/matrix/soak.rs.
import json, os, subprocess


def say(*command):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout


def read(path):
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def below(top):
    return sum(len(names) + len(files) for _, names, files in os.walk(top))


own = os.getpid()
# Whoever asks, and sshd's own children of the moment, are not what stays.
pids = [int(p) for p in os.listdir("/proc") if p.isdigit() and int(p) != own]
numbers = {"processes": 0, "threads": 0, "descriptors": 0, "rss_kib": 0, "mappings": 0}
namespaces, mounts = set(), set()
for pid in pids:
    status = dict(line.split(":\t", 1) for line in read(f"/proc/{pid}/status").splitlines() if ":\t" in line)
    if not status or status["State"].startswith("Z"):
        continue
    numbers["processes"] += 1
    numbers["threads"] += int(status["Threads"])
    # What the container's program allocates is its own: it reads a log that grows. Of what a migration might
    # leave in it, there would be a mapping more each time.
    if read(f"/proc/{pid}/cgroup").strip().endswith("/box"):
        numbers["mappings"] += len(read(f"/proc/{pid}/maps").splitlines())
    else:
        numbers["rss_kib"] += int(status.get("VmRSS", "0 kB").split()[0])
    try:
        numbers["descriptors"] += len(os.listdir(f"/proc/{pid}/fd"))
        for name in os.listdir(f"/proc/{pid}/ns"):
            namespaces.add(os.readlink(f"/proc/{pid}/ns/{name}"))
    except OSError:
        pass
    mounts.update((os.readlink(f"/proc/{pid}/ns/mnt"), line) for line in read(f"/proc/{pid}/mountinfo").splitlines())
numbers["namespaces"] = len(namespaces)
numbers["mounts"] = len(mounts)
numbers["netns"] = len(os.listdir("/run/netns")) if os.path.isdir("/run/netns") else 0
numbers["links"] = len(os.listdir("/sys/class/net"))
numbers["addresses"] = len(say("ip", "-o", "address").splitlines())
numbers["neighbours"] = len([l for l in say("ip", "neigh", "show", "proxy").splitlines()])
numbers["rules"] = len(say("nft", "list", "ruleset").splitlines())
for name in os.listdir("/run/netns") if os.path.isdir("/run/netns") else []:
    numbers["rules"] += len(say("ip", "netns", "exec", name, "nft", "list", "ruleset").splitlines())
numbers["groups"] = sum(1 for _ in os.walk("/sys/fs/cgroup"))
numbers["ipc"] = len(say("ipcs", "-a").splitlines())
for top in ("/run", "/run/ferry", "/run/runc", "/dev/shm", "/tmp", "/var/lib/ferry", "/var/log/ferry", "/srv/shared"):
    numbers[f"below {top}"] = below(top)
# Journals of what is over are kept on purpose: a thousand of them, and no more.
over = below("/var/lib/ferry/migrations/over")
numbers["below /var/lib/ferry"] -= over
print(json.dumps({"numbers": numbers, "over": over}))
