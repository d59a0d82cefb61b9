#!/usr/bin/env bash
# Makes .venv with koala (editable) and its dependencies at the versions of requirements.lock.
#
#   bash scripts/setup.sh                  what training and tables need (the extra `suite`)
#   bash scripts/setup.sh dev ecosystem    and these extras of pyproject.toml
#
# Needs git, bash and Python 3.11 to 3.14 with venv: takes the newest, or PYTHON=... PIP_* variables are pip's own (index, cache,
# wheel folder). Returns at once when there is nothing to do: a stamp per extra in .venv, written last, holds the hash of
# the files it was made from.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
incomplete=$venv/koala-setup-incomplete
log=$venv/koala-setup.log
wanted=(suite "$@")
hash=$(cat pyproject.toml requirements.lock | git hash-object --stdin)

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

is_done() {
    local extra
    [ ! -e "$incomplete" ] || return 1
    for extra in "${wanted[@]}"; do
        [ "$(cat "$venv/koala-setup-$extra" 2>/dev/null)" = "$hash $PWD" ] || return 1
    done
}

find_python() {
    local candidates=${PYTHON:-python3.14 python3.13 python3.12 python3.11 python3}
    for python in $candidates; do
        "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && return
    done
    die "no Python 3.11 to 3.14 found (tried: $candidates). Install one, or name it: PYTHON=/path/to/python3 bash $0"
}

make_venv() {
    local version
    mkdir "$venv" && touch "$incomplete"
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv "$venv"
    elif "$python" -m pip --version >/dev/null 2>&1; then
        # Debian splits ensurepip off its Python; the system's pip can fill an environment that has none
        "$python" -m venv --without-pip "$venv"
        "$python" -m pip --python "$venv/bin/python" install --quiet pip \
            || { rm -rf "$venv"; die "this Python has no ensurepip and its pip could not install pip into $venv (message above)."; }
    else
        rm -rf "$venv"
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        die "this Python cannot make environments with pip in them (no ensurepip). On Debian or Ubuntu, once:" \
            "apt-get update && apt-get install -y python$version-venv"
    fi
}

# One line of progress on a terminal; everything is in the log.
progress() {
    if [ -t 2 ]; then
        awk '/^ *(Collecting|Downloading|Using cached|Installing)/ {printf "\r\033[K  %.100s", $0 > "/dev/stderr"; fflush()}
             END {printf "\r\033[K" > "/dev/stderr"}'
    else
        cat >/dev/null
    fi
}

install() {
    local IFS=, target
    target=".[${wanted[*]}]"
    say "installing koala${target#.} into $venv (some minutes and 6 GB the first time; log: $log)"
    # Two retries: pip's five with growing waits take minutes per package to find out that there is no network.
    PIP_RETRIES=${PIP_RETRIES:-2} PIP_DISABLE_PIP_VERSION_CHECK=1 \
        "$venv/bin/python" -m pip install --constraint requirements.lock --editable "$target" 2>&1 | tee "$log" | progress
}

is_done && exit
find_python

# One set-up at a time. The lock belongs to the open file, so it ends with this process however that ends; Python takes it
# because macOS has no flock command.
exec 9>.venv.lock
"$python" -c '
import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("setup: another set-up is at work here, waiting for it", file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)'
is_done && exit

if [ -e "$incomplete" ]; then
    say "the last set-up was interrupted; starting again from an empty $venv"
    rm -rf "$venv"
elif [ -e "$venv" ] && ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    # never delete an environment that this script has not made
    [ -e "$log" ] || die "$venv has no working pip and was not made by this script; move it away and run this again."
    say "the Python of $venv is gone; starting again"
    rm -rf "$venv"
fi
[ -e "$venv" ] || make_venv

touch "$incomplete"
if ! install; then
    rm -f "$incomplete"                    # pip gave up by itself and put back what it had touched
    tail -n 12 "$log" >&2
    die "pip could not install the packages (its last lines above, all of them in $log). Without network, give pip a mirror" \
        "(PIP_INDEX_URL), a folder of wheels (PIP_FIND_LINKS), or a filled cache (PIP_CACHE_DIR), and run this again."
fi
for extra in "${wanted[@]}"; do
    echo "$hash $PWD" > "$venv/koala-setup-$extra"
done
rm -f "$incomplete"
say "done"
