# Two programs below it. supervisorctl finds it by its socket, which is renamed after it was bound.
# shellcheck shell=bash disable=SC2034,SC2154  # what tests/programs.sh sets and reads
name='supervisord, two programs'
how='supervisorctl status and restart after each move, by the socket; the other program answers 4 connections'
supervisor_made() {
    make_container <<'TXT' || return 1
#!/bin/sh
exec supervisord -n -c /etc/supervisor/supervisord.conf >/log 2>&1
TXT
    cat >"$(rootfs a)/etc/supervisor/conf.d/two.conf" <<'TXT'
[program:sums]
command=python3 /server.py
[program:cache]
command=memcached -u root -l 0.0.0.0
TXT
    cp tests/programs/sum_server.py "$(rootfs a)/server.py" && start_container 7000 &&
        wait_until 30 answers client "$address" 11211
}
ctl() { on "$from" ferry exec supervisor supervisorctl "$@"; }
pid_of() { ctl status "$1" | sed -n 's/.*RUNNING *pid \([0-9]*\),.*/\1/p'; }
both_run() { [ "$(ctl status | grep -c ' RUNNING ')" = 2 ]; }
obeys() {
    local sums said
    both_run || return 1
    sums=$(pid_of sums)
    said=$(ctl restart cache) || return 1
    # Its number may be the same: that of the old one is free when the new one begins.
    [ "$said" = $'cache: stopped\ncache: started' ] && [ "$(pid_of sums)" = "$sums" ]
}
needed "it starts" supervisor_made || return 0
check "both programs run" wait_until 30 both_run
needed "clients ask one of them" asks sum || return 0
check "supervisorctl restarts the other" obeys
check "it can go" on "$from" ferry check "$program" "$to"
for time in first second third; do
    check "it moves the $time time" move
    check "supervisorctl finds it and restarts one" obeys
done
asking_ends
