# Keys and counters of each connection's own.
# shellcheck shell=bash disable=SC2034,SC2154  # what tests/programs.sh sets and reads
how='8 connections: each value is the last that was set, each counter counts on'
memcached_made() {
    make_container <<'TXT' || return 1
#!/bin/sh
exec memcached -u root -l 0.0.0.0 -m 64 >/log 2>&1
TXT
    start_container 11211
}
needed "it starts" memcached_made || return 0
needed "clients set, get and count" asks memcached --connections 8 || return 0
moves
asking_ends
