# A container of podman's or docker's for contrib/demo --engine and contrib/bench. Sourced after stage.sh.
# shellcheck shell=bash
# shellcheck disable=SC2154  # `shared`, `net`, `scratch` and `top` are stage.sh's

# engine_ready ENGINE HOST...: on each host ferry is the engine's runtime, with a macvlan network `lan` in the
# hosts' segment, and the image app:1 with the server in it.
engine_ready() {
    local engine=$1 host
    shift
    for host in "$@"; do
        "${engine}_with_ferry" "$host" || return 1
        # shellcheck disable=SC2016  # the dollars are the host's
        on "$host" sh -euc '
            "$1" network create --driver macvlan --opt parent=eth0 --subnet "$2.0/24" lan >/dev/null
            mkdir -p /tmp/image/tmp
            cp "$3" /tmp/image/counter-server
        ' sh "$engine" "$net" /srv/shared/counter-server || return 1
    done
    # The same one, or it would have another ID over there.
    # shellcheck disable=SC2016
    on "$1" sh -euc '
        tar -C /tmp/image -c . | "$1" import - app:1
        "$1" save --output /srv/shared/app.tar app:1
    ' sh "$engine" || return 1
    shift
    for host in "$@"; do
        on "$host" "$engine" load --input /srv/shared/app.tar || return 1
    done
}

podman_with_ferry() { # HOST
    # These hosts' control groups have no controllers: no limit can be set.
    on "$1" sh -euc 'cat >/etc/containers/containers.conf' <<'TOML'
[engine]
runtime = "ferry"
runtime_supports_json = ["crun", "runc", "ferry"]
[engine.runtimes]
ferry = ["/usr/local/bin/ferry"]
[containers]
pids_limit = 0
TOML
}

docker_with_ferry() { # HOST
    on "$1" sh -euc 'mkdir -p /etc/docker; cat >/etc/docker/daemon.json' <<'JSON' || return 1
{
  "runtimes": { "ferry": { "path": "/usr/local/bin/ferry" } },
  "default-runtime": "ferry",
  "live-restore": true,
  "storage-driver": "overlay2",
  "features": { "containerd-snapshotter": false }
}
JSON
    on "$1" sh -c 'setsid -f dockerd >>/var/log/dockerd.log 2>&1 </dev/null'
    wait_until 60 docker_is_up "$1" || { on "$1" tail -n 20 /var/log/dockerd.log >&2; return 1; }
}
docker_is_up() { on "$1" docker info >/dev/null 2>&1; }

# engine_run ENGINE HOST NAME ADDRESS COMMAND...: in the network `lan`.
engine_run() {
    local engine=$1 host=$2 name=$3 address=$4
    shift 4
    on "$host" "$engine" run --detach --name "$name" --network lan --ip "$address" app:1 "$@" >/dev/null
}

# engine_forget ENGINE HOST NAME: what is left there of one that has gone, before it comes back.
engine_forget() { on "$2" "$1" rm "$3" >/dev/null; }
