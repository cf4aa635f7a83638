# pgbench's TPC-B with eight connections. What it says was done is in the history, and the three sums agree.
# shellcheck shell=bash disable=SC2016,SC2034,SC2154  # what tests/programs.sh sets and reads
name=PostgreSQL
how='pgbench, 8 connections: three sums of balances and the history agree, each transaction is there'
bin=$(cd "$image" && echo usr/lib/postgresql/*/bin)
package=postgresql-$(basename "$(dirname "$bin")")

# It refuses to be root, and CRIU needs CAP_SYS_RESOURCE to dump another user's processes, which some
# machines lack: it is told that it is who owns the files.
postgresql_made() {
    local user=(setpriv --reuid postgres --regid postgres --clear-groups) id
    make_container '.process.env += ["LD_PRELOAD=/not-root.so"]' <<TXT || return 1
#!/bin/sh
mkdir -p /run/postgresql
exec /$bin/postgres -D /data -c listen_addresses='*' -c shared_buffers=128MB -c dynamic_shared_memory_type=posix >/log 2>&1
TXT
    id=$(inside id -u postgres)
    echo "unsigned getuid(void) { return $id; } unsigned geteuid(void) { return $id; }" |
        gcc -shared -fPIC -nostdlib -o "$(rootfs a)/not-root.so" -x c - || return 1
    inside install -d -m 700 -o postgres -g postgres /data && inside "${user[@]}" "/$bin/initdb" -D /data -A trust || return 1
    echo 'host all all 0.0.0.0/0 trust' >>"$(rootfs a)/data/pg_hba.conf"
    start_container 5432
}
query() { on client timeout 60 psql -h "$address" -U postgres -At -c "$1" postgres; }
pgbench_is_on() { [ "$(query "select count(*) > 100 from pgbench_history")" = t ]; }
# Done is what it has been told of: the log has a line for each.
done_by_pgbench() { sed -n 's/^number of transactions actually processed: \([0-9]*\).*/\1/p' "$scratch/load"; }

needed "it starts" postgresql_made || return 0
check "tables are filled" on client "/$bin/pgbench" -h "$address" -U postgres -q -i -s 5 postgres
# An hour, unless its own alarm clock rings before.
loaded sh -c "cd /tmp && echo \$\$ >pgbench.pid && exec /$bin/pgbench -h $address -U postgres -n -c 8 -j 2 -T 3600 -l --log-prefix=bench postgres"
pgbench_ends() {
    on client sh -c 'kill -ALRM "$(cat /tmp/pgbench.pid)"' && load_ends
}
check "pgbench is at work" wait_until 30 pgbench_is_on
moves
check "pgbench ends well" pgbench_ends
check "no transaction failed" grep -q '^number of failed transactions: 0 ' "$scratch/load"
check "each that it was told of is there" test "$(query 'select count(*) from pgbench_history')" = "$(done_by_pgbench)"
check "the sums agree" test "$(query '
    select count(distinct s) from (select sum(abalance) s from pgbench_accounts union all
        select sum(bbalance) from pgbench_branches union all select sum(tbalance) from pgbench_tellers union all
        select sum(delta) from pgbench_history) x')" = 1
check "it can be stopped and says that all is whole" test "$(query 'select count(*) from pgbench_accounts')" = 500000
# Lines of it: client, transaction, microseconds, script, and when it ended in seconds and microseconds.
gap=$(on client sh -c 'cat /tmp/bench.*' | sort -n -k 5 -k 6 | awk '
    { now = $5 * 1000 + $6 / 1000 }
    NR > 1 && now - last > silence { silence = now - last }
    $3 > most { most = $3 }
    { last = now }
    END { printf "%d | %d\n", silence, most / 1000 }')
