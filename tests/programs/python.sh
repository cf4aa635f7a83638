# asyncio with a pool of processes, a manager, a semaphore and memory that they share.
# shellcheck shell=bash disable=SC2034,SC2154  # what tests/programs.sh sets and reads
name='Python, asyncio and multiprocessing'
how='8 connections: sums are made in a pool of 4 processes and counted in shared memory under a lock'
package=python3
python_made() {
    make_container <<'TXT' || return 1
#!/bin/sh
exec python3 /server.py >/log 2>&1
TXT
    cp tests/programs/pool_server.py "$(rootfs a)/server.py" && start_container 7000
}
needed "it starts" python_made || return 0
needed "clients ask" asks sum --connections 8 || return 0
moves
asking_ends
nothing_is_said() { ! grep . "$(rootfs "$from")/log"; }
check "its counts agree" nothing_is_said
