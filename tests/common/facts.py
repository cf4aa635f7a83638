# What there is on a host: printed as one JSON object. For tests/common/facts.rs.
import glob, json, os, subprocess


def say(*command):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout


def read(path):
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def names(path):
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


processes = []
for pid in filter(str.isdigit, names("/proc")):
    stat = read(f"/proc/{pid}/stat")
    if stat:
        state = stat.rsplit(")", 1)[1].split()[0]
        line = read(f"/proc/{pid}/cmdline").replace("\0", " ").strip()
        processes.append({"pid": int(pid), "name": read(f"/proc/{pid}/comm"), "state": state, "line": line})

containers = {}
for name in names("/run/runc"):
    answer = say("runc", "state", name)
    if answer:
        state = json.loads(answer)
        group = read(f"/proc/{state['pid']}/cgroup").rsplit("::", 1)[-1].split("\n")[0]
        containers[name] = {
            "status": state["status"],
            "pid": state["pid"],
            "frozen": read(f"/sys/fs/cgroup{group}/cgroup.freeze"),
        }

tables = say("nft", "list", "tables").split("\n")
for name in names("/run/netns"):
    tables += say("ip", "netns", "exec", name, "nft", "list", "tables").split("\n")

migrations = []
for line in say("ferry", "migrations", "--json").split("\n"):
    if line:
        migrations.append(json.loads(line))

probes = []
for top in ("/srv/shared", "/srv/local", "/tmp", "/var/log"):
    for where, _, files in os.walk(top):
        probes += [os.path.join(where, f) for f in files if f.startswith(".ferry-probe-")]

print(json.dumps({
    "containers": containers,
    "processes": processes,
    "groups": sorted(g for g in glob.glob("/sys/fs/cgroup/**/cgroup.freeze", recursive=True) if read(g) == "1"),
    "work": names("/run/ferry"),
    "mounts": [line.split()[4] for line in read("/proc/self/mountinfo").split("\n") if " /run/ferry/" in line],
    "netns": names("/run/netns"),
    "tables": [table for table in tables if "ferry" in table],
    "migrations": migrations,
    "probes": sorted(probes),
}))
