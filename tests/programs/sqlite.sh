# Four processes write into one database in WAL mode. Each row that a client has an `ok` for is there.
# shellcheck shell=bash disable=SC2034,SC2154  # what tests/programs.sh sets and reads
name='sqlite, WAL, 4 processes'
how='8 connections insert rows, synchronous=FULL: each acknowledged row is there once, integrity_check'
package=libsqlite3-0
sqlite_made() {
    make_container <<'TXT' || return 1
#!/bin/sh
exec python3 /server.py >/log 2>&1
TXT
    cp tests/programs/sqlite_server.py "$(rootfs a)/server.py" && start_container 7000
}
needed "it starts" sqlite_made || return 0
needed "clients insert" asks rows --connections 8 || return 0
moves
asking_ends
check "all $(asked .rows) rows are there" asked '.rows > 100 and .missing == []'
check "none twice" asked '.twice == 0'
check "the database is whole" asked '.integrity == "ok"'
