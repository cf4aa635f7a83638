# How the suites in shell count what they look at. Meant to be sourced; `scratch` is a directory.
# shellcheck shell=bash

passed=0 failed=0

# check WHAT COMMAND...: one line for each thing that is looked at; what it said last, only if it failed.
check() {
    local what=$1
    shift
    # shellcheck disable=SC2154  # whoever sources this makes it
    if "$@" >"$scratch/out" 2>&1; then
        passed=$((passed + 1))
        printf 'ok      %s\n' "$what"
    else
        failed=$((failed + 1))
        printf 'FAILED  %s\n' "$what"
        tail -n 30 "$scratch/out" | sed 's/^/        | /'
    fi
}

# suite_begin WHAT: a lab of the suite's own, and `load`, a client in the background if there is one: both end
# with it. After contrib/stage.sh.
suite_begin() {
    load=''
    stage_name "$1"
    trap suite_end EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
}
suite_end() {
    trap '' INT TERM HUP
    [ -z "$load" ] || kill "$load" 2>/dev/null
    stage_clear
}

# counted: the last line of a suite, and whether nothing failed.
counted() {
    echo "$passed passed, $failed failed"
    [ $failed = 0 ]
}

# goes_on: ends the suite where nothing that follows could succeed.
goes_on() { [ $failed = 0 ] || { counted; exit 1; }; }
