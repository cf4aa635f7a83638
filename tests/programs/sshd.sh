# An interactive session: a shell with a terminal, variables, a stopped job and one in the background.
# shellcheck shell=bash disable=SC2034,SC2154  # what tests/programs.sh sets and reads
name='OpenSSH, an interactive session'
how='a shell counts at its terminal; its jobs, the size of the terminal, and Ctrl-C are as they were'
package=openssh-server
sshd_made() {
    make_container <<'TXT' || return 1
#!/bin/sh
mkdir -p /run/sshd
exec /usr/sbin/sshd -D -e -o UsePAM=no -o PermitRootLogin=prohibit-password >/log 2>&1
TXT
    inside ssh-keygen -A && mkdir -p "$(rootfs a)/root/.ssh" &&
        cp "$(lab root client)/root/.ssh/authorized_keys" "$(rootfs a)/root/.ssh/authorized_keys" &&
        chmod 700 "$(rootfs a)/root" "$(rootfs a)/root/.ssh" && start_container 22
}
types() {
    loaded python3 /srv/shared/ssh_session.py "$address"
    wait_until 30 said ready || { cat "$scratch/load" "$scratch/load.err"; return 1; }
}
cp tests/programs/ssh_session.py "$shared/"
needed "it starts" sshd_made || return 0
needed "somebody is logged in" types || return 0
moves
asking_ends
