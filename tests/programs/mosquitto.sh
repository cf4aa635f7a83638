# One client publishes numbers with QoS 2, another is subscribed with QoS 2.
# shellcheck shell=bash disable=SC2034,SC2154  # what tests/programs.sh sets and reads
how='QoS 2, a message each 5 ms: each number comes once, in order, in one session'
mosquitto_made() {
    make_container <<'TXT' || return 1
#!/bin/sh
exec mosquitto -c /mosquitto.conf >/log 2>&1
TXT
    cat >"$(rootfs a)/mosquitto.conf" <<'TXT'
listener 1883 0.0.0.0
allow_anonymous true
user root
max_queued_messages 0
persistence true
persistence_location /data/
TXT
    mkdir "$(rootfs a)/data" && start_container 1883
}
publishes() {
    loaded python3 /srv/shared/mqtt.py "$address"
    wait_until 30 said ready || { cat "$scratch/load" "$scratch/load.err"; return 1; }
}
cp tests/programs/mqtt.py "$shared/"
needed "it starts" mosquitto_made || return 0
needed "a client publishes and another is told" publishes || return 0
moves
asking_ends
check "all of $(asked .sent) messages came" asked '.sent > 100 and .missing == 0'
check "none twice, each in its place" asked '.twice == 0 and .disordered == 0'
