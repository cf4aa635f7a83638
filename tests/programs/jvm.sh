# A JVM with G1 and some hundred threads, which collects its garbage all the time.
# shellcheck shell=bash disable=SC2016,SC2034,SC2154  # what tests/programs.sh sets and reads
name='OpenJDK, G1, 300 threads'
how='8 connections, each with a sum that a thread keeps; 300 more threads allocate and check what they keep'
package=openjdk-25-jre-headless
jvm_made() {
    make_container <<'TXT' || return 1
#!/bin/sh
exec java -XX:+UseG1GC -Xmx256m -cp / Server >/log 2>&1
TXT
    # Its classes are made here, so that the compiler's memory does not travel.
    cp tests/programs/Server.java "$(rootfs a)/Server.java" &&
        on a sh -c 'cd "$1/rootfs" && javac Server.java' sh "$(bundle)" && start_container 7000
}
needed "it starts" jvm_made || return 0
needed "clients ask" asks sum --connections 8 || return 0
moves
asking_ends
no_thread_complains() { ! grep . "$(rootfs "$from")/log"; }
check "no thread has found anything wrong" no_thread_complains
